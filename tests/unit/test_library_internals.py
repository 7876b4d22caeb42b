"""Private names of other libraries: used in dkd/library_internals alone, still there, and still of the same meaning."""

import ast
import inspect
import math
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launched import limit
from torch import nn

from dkd.library_internals import torch as torch_internals

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "library_internals"
DOCUMENTED = {"_exit", "_replace", "_asdict", "_fields", "_make"}  # of os and of named tuples
LIBRARIES = ("torch", "torchvision", "accelerate", "deepspeed", "datasets", "pickle", "numpy", "PIL", "pydantic")
PRIVATE_MODULE = re.compile(rf"({'|'.join(LIBRARIES)})(\.\w+)*\._\w+(\.\w+)*")


def is_private(name):
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def own_names(trees):
    """All names that dkd defines itself: what `self._name` may be."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def private_names(tree, ours):
    """What a module uses of others: attributes, imports, and names in text that leads to them."""
    here = own_names([tree])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in DOCUMENTED:
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not of_self or node.attr not in ours:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("dkd"):
            for name in [*node.module.split("."), *(alias.name for alias in node.names)]:
                if is_private(name):
                    yield node.lineno, f"{name} of {node.module}"
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if any(map(is_private, a.name.split("."))))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
            if is_private(name) and name not in here:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and PRIVATE_MODULE.fullmatch(node.value):
            yield node.lineno, node.value


def test_private_names_of_other_libraries_are_used_in_one_folder():
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "dkd").rglob("*.py"))}
    ours = own_names(trees.values())
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in trees.items()
        if FOLDER not in path.parts
        for line, name in private_names(tree, ours)
    ]
    assert not found, "give these a function in dkd/library_internals:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "torch._foreach_add_(a, b)",
        "group._get_backend(device)",
        "from torch._subclasses import FakeTensorMode",
        "from torch.nn.modules.batchnorm import _NormBase",
        "import torch._inductor.config",
        'importlib.import_module("torch._inductor.config")',
        'getattr(model, "_no_split_modules", None)',
        "self._of_a_base_class_elsewhere()",
    ],
)
def test_a_private_name_is_found(code):
    assert list(private_names(ast.parse(code), {"_own"}))


def test_the_projects_own_private_names_are_no_findings():
    code = "self._own = os._exit\npoint._replace(x=1)\nself.__class__.__name__\nfrom dkd.a import _b"
    assert not list(private_names(ast.parse(code), {"_own"}))


def test_every_name_has_a_reason_and_a_release():
    for path in (ROOT / "dkd" / FOLDER).glob("[!_]*.py"):
        tree = ast.parse(path.read_text())
        assert re.search(r"read in \w+ \d+\.\d+", ast.get_docstring(tree)), f"{path.name} names no release"
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


# torch


def test_lists_of_tensors_are_copied_added_and_interpolated():
    a, b = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([5.0, -6.0]), torch.tensor(math.nan)]
    torch_internals.add_lists(a, [b[0], torch.tensor(1.0)])
    assert [t.tolist() for t in a] == [[6.0, -4.0], 4.0], "torch._foreach_add_ no longer adds in place"
    torch_internals.lerp_lists(a, [torch.zeros(2), torch.tensor(8.0)], 0.25)
    assert [t.tolist() for t in a] == [[4.5, -3.0], 5.0], "torch._foreach_lerp_ is no longer a + w·(b − a)"
    norms = torch_internals.norm_lists([*a, b[1]], math.inf)
    assert [float(n) for n in norms[:2]] == [4.5, 5.0], "torch._foreach_norm is no longer the largest absolute value"
    assert math.isnan(norms[2]), "torch._foreach_norm no longer keeps a NaN"
    torch_internals.copy_lists(a, b)
    assert torch.equal(a[0], b[0]), "torch._foreach_copy_ no longer copies in place"


def test_bases_of_layers_hold_what_they_held():
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm2d)
    assert all(issubclass(layer, torch_internals.NORMS_WITH_STATISTICS) for layer in norms)
    assert not issubclass(nn.GroupNorm, torch_internals.NORMS_WITH_STATISTICS), "_NormBase is now a base of GroupNorm"
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    assert all(issubclass(layer, torch_internals.CONVOLUTIONS) for layer in convolutions)
    assert not issubclass(nn.Linear, torch_internals.CONVOLUTIONS), "_ConvNd is now a base of Linear"


def test_fake_tensors_have_a_dtype_and_no_numbers():
    with torch_internals.FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        made = nn.Linear(10**6, 10**6)(torch.zeros(2, 10**6))  # 4 TB, were it computed
    assert (made.dtype, tuple(made.shape)) == (torch.bfloat16, (2, 10**6)), "FakeTensorMode no longer follows autocast"


def test_changes_in_place_are_counted():
    tensor = torch.zeros(3)
    before = torch_internals.change_count(tensor)
    tensor.add_(1)
    assert torch_internals.change_count(tensor) > before, "Tensor._version no longer counts changes in place"


def test_shared_storage_is_shared():
    storage = torch_internals.shared_storage(100)
    assert storage.nbytes() == 100
    assert storage.is_shared(), "UntypedStorage._new_shared no longer shares"


def test_inductor_can_be_deterministic():
    from torch._inductor import config

    with config.patch("deterministic", False):  # monkeypatch would leave this module without the setting
        torch_internals.make_inductor_deterministic()
        assert config.deterministic is True


def test_compiled_modules_name_their_parameters_by_a_prefix():
    names = torch.compile(nn.Linear(2, 2)).state_dict()
    assert list(names) == [f"{torch_internals.COMPILED_PREFIX}{name}" for name in ("weight", "bias")]


@pytest.fixture
def one_rank():
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_process_groups_and_their_timeouts_are_found():
    cpu, world, other = torch.device("cpu"), dist.group.WORLD, dist.new_group(timeout=timedelta(seconds=55))
    groups = torch_internals.process_groups()
    assert len(groups) == 2, f"_world.pg_map lists {len(groups)} process groups, not 2"
    assert all(any(group is known for known in groups) for group in (world, other))
    seconds = [torch_internals.group_timeout(group, cpu).total_seconds() for group in (world, other)]
    assert seconds == [77, 55], "options._timeout is no longer the group's timeout"
    torch_internals.set_group_timeout(timedelta(seconds=33), other)
    assert torch_internals.group_timeout(other, cpu) == timedelta(seconds=33), "set_timeout no longer sets it"


def test_checkpoints_pickle_only_listed_names(tmp_path):
    from dkd.checkpoints import save_tensors, saved_tensors

    save_tensors(tmp_path, {"a": torch.zeros(3), "b": torch.zeros(2, 2, dtype=torch.int64)}, None)
    assert set(saved_tensors(tmp_path)) == {"a", "b"}, "metadata of a checkpoint names something that is not listed"
    pickled = (tmp_path / ".metadata").read_bytes()
    for module, names in torch_internals.METADATA_GLOBALS.items():
        absent = [name for name in names if not hasattr(sys.modules[module], name)]
        assert not absent, f"{module} no longer has {absent}"
    for name in ("_StorageInfo", torch_internals.METADATA_MEMORY_FORMAT):
        assert name.encode() in pickled, f"a checkpoint's metadata no longer names {name}: take it from the list"


# pickle


def test_the_unpickler_in_python_can_be_overridden():
    import pickle

    from dkd.library_internals.pickle import PythonUnpickler

    assert isinstance(inspect.getattr_static(PythonUnpickler, "load"), type(lambda: None)), "it is no longer in Python"
    assert PythonUnpickler.dispatch[pickle.BUILD[0]] is PythonUnpickler.load_build


# torchvision


def test_some_data_sets_keep_their_labels_under_the_private_name_alone():
    import torchvision

    from dkd.library_internals.torchvision import LABEL_ATTRIBUTES

    assert "self._labels" in inspect.getsource(torchvision.datasets.DTD), "DTD keeps its labels elsewhere now"
    assert "_labels" in LABEL_ATTRIBUTES


# Accelerate


def test_accelerate_chooses_backend_and_distribution_in_one_method():
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from dkd.library_internals.accelerate import PREPARE_BACKEND

    method = getattr(PartialState, PREPARE_BACKEND)
    assert f"self.{PREPARE_BACKEND}(" in inspect.getsource(PartialState.__init__), "PartialState chooses elsewhere now"
    backend, kind = method(SimpleNamespace(), cpu=True)
    assert kind in (DistributedType.NO, DistributedType.MULTI_CPU), f"it returns {backend}, {kind} on a CPU"


def test_accelerates_settings_can_be_forgotten():
    from accelerate import Accelerator
    from accelerate.state import GradientState, is_initialized

    from dkd.library_internals.accelerate import reset_accelerate

    reset_accelerate()
    Accelerator(cpu=True, gradient_accumulation_steps=3)
    assert is_initialized()
    assert GradientState().num_steps == 3
    reset_accelerate()
    assert not is_initialized(), "AcceleratorState._reset_state leaves its settings"
    assert GradientState().num_steps == 1, "GradientState._reset_state leaves its settings"
    Accelerator(cpu=True, mixed_precision="bf16")  # refused where settings of the first are left
    reset_accelerate()


def test_accelerate_shards_the_named_classes_as_units():
    import functools

    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    from dkd.library_internals.accelerate import set_units_of_sharding

    model = nn.Sequential(nn.Linear(2, 2), nn.Bilinear(2, 2, 2))
    set_units_of_sharding(model, ["Bilinear"])
    plugin = SimpleNamespace(
        auto_wrap_policy=functools.partial(transformer_auto_wrap_policy), transformer_cls_names_to_wrap=None
    )
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [policy(module) for module in model] == [False, True], "Accelerate no longer reads _no_split_modules"


# DeepSpeed

ZERO = """
import sys
import torch
import torch.distributed as dist
from dkd.library_internals import deepspeed as internals

internals.leave_out_shared_memory_op()
import deepspeed

stage = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    config={
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    },
)
weight = model[0].weight
assert internals.whole_shape(weight) == (5, 3), "ds_shape is no longer the shape of the whole parameter"
assert internals.whole_numel(weight) == 15, "ds_numel no longer counts the whole parameter"
shard = internals.shard_of(weight)
if stage < 3:
    assert shard is None, "a parameter that is not sharded has a ds_tensor"
else:
    assert weight.numel() == 0 and shard.dim() == 1 and shard.numel() >= 15, "ds_tensor is no longer a flat shard"
engine.eval()
with torch.no_grad():
    engine(torch.zeros(4, 3))
internals.release_whole_weights(engine)
assert stage < 3 or weight.numel() == 0, "empty_partition_cache no longer frees whole weights"
zero = engine.optimizer
flat = internals.flat_parameters(zero)
assert sum(tensor.numel() for tensor in flat) >= 15 + 5 + 10 + 2, "the flat tensors do not hold all parameters"
grouped = internals.parameters_by_flat(zero)
if stage == 3:
    assert not grouped, "ZeRO-3 has bit16_groups"
else:
    updated = [p for group in zero.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in updated] == [id(p) for p in flat], "the optimizer updates other tensors"
    assert [len(parameters) for parameters, _ in grouped] == [4], "bit16_groups no longer holds the parameters"
    assert grouped[0][1] is flat[0], "bit16_groups does not go with the flat tensors"
print("fine")
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_keeps_shards_and_flat_tensors_where_it_did(stage):
    result = subprocess.run(
        [sys.executable, "-c", ZERO, str(stage)],
        capture_output=True,
        text=True,
        timeout=limit(120),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"},
    )
    assert result.stdout.endswith("fine\n"), result.stderr[-3000:]
