"""The collectives that GPUs use and CPUs replace by others, on real processes with gloo, which has both."""

import gpu_way_cases
import pytest
from shared_launches import SharedLaunches, launch, names_in, parameters, without_errors

CASES = {case.__name__: (f"gpu_way_cases:{case.__name__}",) for case in gpu_way_cases.CASES}


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    def uses(item):
        return [(parameters(item)["world"], {name: CASES[name] for name in names_in(item, set(CASES))})]

    return SharedLaunches(
        request, uses, lambda world, cases: launch(world, tmp_path_factory.mktemp(f"world{world}"), cases)
    )


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_the_way_of_cpus(results, world):
    """Two ranks add in one order only; of four, the order differs, and the last bits with it."""
    grids = {2: 3, 4: 6}[world]
    for found in without_errors(results[world]["losses_in_the_way_of_gpus"]):
        assert len(found) == 2 * (7 * grids + grids + 1 + 1)
        for name, difference in found.items():
            # bfloat16 rounds what is sent; what is added of it is float32.
            assert difference["error"] < (1e-5 if "bf16" in name else 1e-12), (name, difference)
            assert difference["equal"] or world > 2, (name, difference)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_plain_formulas(results, world):
    """tests/distributed/test_one_gpu.py has the same on GPUs."""
    for errors in without_errors(results[world]["losses_beside_plain_formulas"]):
        assert len(errors) == 2 * 7 * {2: 3, 4: 6}[world]
        assert max(max(pair) for pair in errors.values()) < 1e-12, errors


@pytest.mark.parametrize("world", [2])
def test_the_way_of_gpus_is_another_one(results, world):
    """Else the test above would compare a way with itself."""
    for plain, forced in without_errors(results[world]["operations_of_each_way"]):
        assert not {"c10d::_reduce_scatter_base_", "c10d::_allgather_base_"} & set(plain), plain
        assert {"c10d::_reduce_scatter_base_", "c10d::_allgather_base_"} <= set(forced), forced
