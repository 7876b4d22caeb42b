"""The files of a teacher's cache: what is read is what was written for these positions, or nothing."""

import json
import os
import shutil

import pytest
import torch

from dkd.atomic_files import remove
from dkd.teacher_cache import CacheKey, Need, StepCache, Turn, Value
from dkd.teacher_cache.folder import summarize, unfinished
from dkd.teacher_cache.key import CacheError, nearest, read_key
from dkd.teacher_cache.part import DamagedPartError, Part, Written, write_part

KEY = CacheKey({"teacher": {"name": "x", "fingerprint": "a" * 64}, "data": {"images": 40}})
LOGITS = Value("logits", {"what": "logits"}, (10,), torch.float32)
RELATIONS = Value("relations.last", {"what": "relations", "batch": 8}, (8,), torch.float32)
B, MICRO = 8, 2
TURN = Turn(B, 5, None, 100)


def needs(*values, micro=MICRO, rank=0, world=1):
    """What a rank needs of each sample of its micro-batches."""
    steps = B // (micro * world)
    return [Need(value, tuple((((a * world + rank) * micro, micro),) for a in range(steps))) for value in values]


def numbers(step, value=LOGITS, period=None):
    """What the teacher yields in a step, (8, ...)."""
    generator = torch.Generator().manual_seed(step if period is None else step % (5 * period))
    return torch.randn(B, *value.shape, generator=generator)


def train(root, steps, turn=TURN, values=(LOGITS,), micro=MICRO, first=0, **more):
    """Run steps as a training does. Returns which of them were read; each was what the teacher yields."""
    cache = StepCache(root, KEY, needs(*values, micro=micro), turn, **more)
    read = []
    for step in range(first, steps):
        found = cache.begin(step)
        for value in values:
            truth = numbers(step, value, turn.period)
            for unit, (begin,) in enumerate([(a,) for a in range(0, B, micro)]):
                if found:
                    assert torch.equal(cache.numbers(value, unit), value.as_read(truth[begin : begin + micro]))
                else:
                    cache.put(value, begin, truth[begin : begin + micro])
        read += [step] * found
        cache.confirm(step)
    cache.confirm(steps)
    cache.flush()
    cache.close()
    return read


def parts(root):
    return sorted(root.rglob("part_*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forms(dtype):
    logits = torch.randn(4, 10, dtype=torch.float64).to(dtype)
    exact, rounded, top = (Value("logits", {}, (10,), dtype, form) for form in ("exact", "bf16", "topk:3"))
    assert torch.equal(exact.as_read(logits), logits)
    assert torch.equal(rounded.as_read(logits), logits.bfloat16().to(dtype))
    assert len({exact.id, rounded.id, top.id}) == 3
    found = top.as_read(logits)
    assert found.dtype == dtype
    largest, places = logits.topk(3)
    assert torch.equal(found.gather(1, places), largest)
    others = found.scatter(1, places, torch.nan)
    assert all(row[~row.isnan()].unique().numel() == 1 for row in others)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double().logsumexp(1), logits.double().logsumexp(1), rtol=0, atol=8 * tolerance)
    for value in (exact, rounded, top):
        assert len(value.encode(logits).flatten(1).view(torch.uint8)[0]) == value.bytes_per_sample


def test_numbers_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="logits: numbers of shape"):
        LOGITS.encode(torch.zeros(4, 11))


@pytest.mark.parametrize("again", ["same", "larger micro-batches", "smaller micro-batches", "short segments"])
def test_what_was_computed_is_read(tmp_path, again):
    assert train(tmp_path, 7) == []
    more = {"larger micro-batches": {"micro": 8}, "smaller micro-batches": {"micro": 1}, "same": {}}
    assert train(tmp_path, 9, **more.get(again, {"segment_bytes": 1, "part_bytes": 100})) == list(range(7))
    assert train(tmp_path, 9) == list(range(9))


def test_a_value_that_is_missing_is_added_and_the_others_stay(tmp_path):
    train(tmp_path, 5)
    before = summarize(tmp_path / KEY.name).bytes
    assert train(tmp_path, 5, values=(LOGITS, RELATIONS)) == []
    found = summarize(tmp_path / KEY.name)
    assert {value.name: value.rows for value in found.values.values()} == {"logits": {0: 40}, "relations.last": {0: 40}}
    # 40 rows of 8 numbers, and the headers of one more part.
    assert found.bytes - before < 40 * 8 * 4 + 4000
    assert train(tmp_path, 5, values=(RELATIONS,)) == list(range(5))


def test_an_epoch_that_repeats_is_read_in_the_run_that_has_filled_it(tmp_path):
    turn = Turn(B, 5, 1, 100)
    # The last step of the first epoch was not yet known to be right when the second one began.
    assert train(tmp_path, 15, turn) == [5, 6, 7, 8, *range(10, 15)]
    assert train(tmp_path, 15, turn) == list(range(15))
    assert [path.parent.name for path in parts(tmp_path)] == ["epoch_00000"] * len(parts(tmp_path))


def test_nothing_of_a_step_that_was_not_confirmed_is_written(tmp_path):
    cache = StepCache(tmp_path, KEY, needs(LOGITS, micro=8), TURN)
    for step in range(4):
        assert not cache.begin(step)
        cache.put(LOGITS, 0, numbers(step))
    cache.confirm(2)
    cache.flush()
    cache.close()
    assert train(tmp_path, 4) == [0, 1]


def test_two_jobs_at_once(tmp_path):
    jobs = [StepCache(tmp_path, KEY, needs(LOGITS, micro=8), TURN) for _ in range(2)]
    for step in range(5):
        for job in jobs:
            assert not job.begin(step)
            job.put(LOGITS, 0, numbers(step))
            job.confirm(step + 1)
    for job in jobs:
        job.flush()
        job.close()
    assert len(parts(tmp_path)) == 2
    assert train(tmp_path, 5) == list(range(5))
    parts(tmp_path)[0].unlink()
    assert train(tmp_path, 5) == list(range(5))


def test_an_epoch_that_fits_is_one_part(tmp_path):
    assert train(tmp_path, 13) == []
    assert [path.parent.name for path in parts(tmp_path)] == ["epoch_00000", "epoch_00001", "epoch_00002"]
    assert train(tmp_path, 13) == list(range(13))


@pytest.mark.parametrize("form", ["exact", "bf16"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (1, 0, 3, 2)])
def test_numbers_lie_in_memory_as_they_did(tmp_path, form, order):
    """The last bits of what is made of them depend on it."""
    value = Value("map", {"what": "feature"}, (3, 4, 5), torch.float32, form)
    shape, back = [(B, 3, 4, 5)[i] for i in order], [order.index(i) for i in range(4)]
    truth = torch.randn(shape).permute(back)
    for read in (False, True):
        cache = StepCache(tmp_path, KEY, needs(value, micro=B), TURN)
        assert cache.begin(0) == read
        if not read:
            cache.put(value, 0, truth)
            cache.confirm(1)
            cache.flush()
        found = cache.numbers(value) if read else value.as_read(truth)
        assert torch.equal(found, truth if form == "exact" else truth.bfloat16().float())
        assert found.stride() == truth.stride()
        cache.close()


def damages(content):
    """Every byte flipped in two ways, of which one turns digits into digits; and the file cut at many lengths, longer,
    or removed."""
    for place in range(len(content)):
        for mask in (0x41, 0x01):
            yield f"byte {place}", content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]
    for length in range(0, len(content), 7):
        yield f"cut at {length}", content[:length]
    yield "longer", content + b"x"
    yield "removed", None


def test_a_damaged_part_never_yields_other_numbers(tmp_path):
    """Each byte of a part, one after the other: what is read is right, or is computed again."""
    small = Value("logits", {"what": "logits"}, (2,), torch.bfloat16)
    what = {small: [Written(0, numbers(0)[:4, :2].bfloat16(), torch.bfloat16)]}
    write_part(tmp_path / "epoch_00000", KEY.name, 0, what, {})
    (path,) = parts(tmp_path)
    content, truth = path.read_bytes(), what[small][0].stored
    outcomes = {"right": 0, "refused": 0}
    for name, damaged in damages(content):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        try:
            part = Part(path, KEY.name, 0)
            if small.id in part.values:
                stored = part.values[small.id]
                right = [list(piece[:2]) for piece in stored.pieces] == [[0, 4]] and stored.dtype == torch.bfloat16
                found = part.read(small.id, range(len(stored.pieces)))
                assert right, name
                assert bytes(found[0]) == truth.view(torch.uint8).numpy().tobytes(), name
                outcomes["right"] += 1
            else:
                outcomes["refused"] += 1
        except (DamagedPartError, OSError):
            outcomes["refused"] += 1
    # Names, and descriptions for people, may be damaged without harm.
    assert outcomes["refused"] > 0.6 * sum(outcomes.values())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "folder", "swapped"])
def test_what_is_damaged_is_computed_again_and_stored_anew(tmp_path, damage):
    lines = []
    train(tmp_path, 10, part_bytes=1)  # a part for each step
    path = parts(tmp_path)[3]
    content = path.read_bytes()
    if damage == "swapped":  # a part of other steps under this name
        path.write_bytes(parts(tmp_path)[4].read_bytes())
    elif damage == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage in ("cut", "empty"):
        path.write_bytes(content[: -9 if damage == "cut" else 0])
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    assert len(train(tmp_path, 10, report=lines.append)) == 9
    assert bool(lines) == (damage not in ("remove", "swapped"))
    assert all(line.startswith(f"warning: the teacher's cache: {path}: ") for line in lines)
    assert len(train(tmp_path, 10, report=lines.append)) == 10


def test_a_disk_that_is_full_ends_the_writing_and_nothing_else(tmp_path):
    lines = []
    cache = StepCache(tmp_path, KEY, needs(LOGITS, micro=8), TURN, report=lines.append)
    shutil.rmtree(cache.folder)
    cache.folder.write_text("no folder")
    for step in range(4):
        assert not cache.begin(step)
        cache.put(LOGITS, 0, numbers(step))
        cache.confirm(step + 1)
        cache.flush()
    cache.close()
    assert len(lines) == 1
    assert lines[0].startswith("warning: the teacher's cache cannot be written")


def test_a_cache_that_is_not_filled_is_not_touched(tmp_path):
    root = tmp_path / "none"
    assert train(root, 3, fill=False) == []
    assert not root.exists()


def test_links_are_not_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / KEY.name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="is a link"):
        StepCache(tmp_path, KEY, needs(LOGITS), TURN)


def test_another_key_is_another_folder_and_is_named(tmp_path):
    train(tmp_path, 2)
    other = CacheKey({"teacher": {"name": "x", "fingerprint": "b" * 64}, "data": {"images": 41}})
    far = CacheKey({"teacher": {"name": "y", "fingerprint": "c" * 64}, "data": {"images": 42}})
    StepCache(tmp_path, far, needs(LOGITS), TURN).close()
    folder, differences = nearest(tmp_path, other)
    assert folder.name == KEY.name
    assert differences == [
        "data.images (40 there, 41 here)",
        "teacher.fingerprint (aaaaaaaaaaaa there, bbbbbbbbbbbb here)",
    ]
    assert read_key(folder)[0].facts == KEY.facts


def test_a_damaged_key_is_written_anew(tmp_path):
    train(tmp_path, 2)
    (tmp_path / KEY.name / "key.json").write_text("{")
    assert read_key(tmp_path / KEY.name)[0] is None
    train(tmp_path, 2)
    assert read_key(tmp_path / KEY.name)[0].facts == KEY.facts


def test_what_a_killed_process_has_left(tmp_path):
    train(tmp_path, 2)
    left = parts(tmp_path)[0].with_name(".writing_0123456789abcdef_part_0000000000_00.safetensors")
    left.write_bytes(b"half")
    assert unfinished(tmp_path / KEY.name) == []  # it may still be written
    os.utime(left, (0, 0))
    assert unfinished(tmp_path / KEY.name) == [left]
    assert train(tmp_path, 2) == [0, 1]


def header_of(path, change):
    """Change the header of a part, which stays valid JSON."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    meta = json.loads(header["__metadata__"]["dkd_teacher_cache"])
    change(header, meta)
    header["__metadata__"]["dkd_teacher_cache"] = json.dumps(meta)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda header, meta: header["0"].update(shape=[]),
        lambda header, meta: header["0"].update(shape="x"),
        lambda header, meta: header["0"].update(data_offsets=[0.0, float(header["0"]["data_offsets"][1])]),
        lambda header, meta: header["0"].update(data_offsets=[0]),
        lambda header, meta: meta.update(values=[]),
        lambda header, meta: meta.update(made_by=None),
        lambda header, meta: next(iter(meta["values"].values())).update(dtype="complex64"),
        lambda header, meta: next(iter(meta["values"].values())).update(pieces=[[0, 16]]),
        lambda header, meta: next(iter(meta["values"].values())).update(pieces=[[0, -16, "x"]]),
    ],
)
def test_a_header_that_makes_no_sense(tmp_path, change):
    train(tmp_path, 2, micro=8)
    (path,) = parts(tmp_path)
    header_of(path, change)
    found = summarize(tmp_path / KEY.name, contents=True)
    assert found.damaged == [path]
    lines = []
    assert train(tmp_path, 2, micro=8, report=lines.append) == []
    assert len(lines) == 1
    remove(path)
    assert train(tmp_path, 2, micro=8) == [0, 1]


def test_what_cannot_be_opened_or_is_of_another_version_is_not_removed(tmp_path, monkeypatch):
    train(tmp_path, 2)
    (path,) = parts(tmp_path)
    header_of(path, lambda header, meta: meta.update(format=2))
    found = summarize(tmp_path / KEY.name)
    assert found.damaged == []
    assert found.problems == [f"{path}: it is of format 2, not 1"]

    def refuse(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("dkd.teacher_cache.part.open_to_read", refuse)
    found = summarize(tmp_path / KEY.name)
    assert found.damaged == []
    assert "Too many open files" in found.problems[0]
    assert found.used >= path.stat().st_mtime > 0  # so that it is not taken to be unused for years


def test_a_few_rows_of_large_micro_batches(tmp_path):
    """Pieces are no larger than some rows; what is kept of them are the rows that are needed."""
    many = Value("logits", {"what": "logits"}, (10,), torch.float32)
    turn = Turn(512, 2, None, 4)
    cache = StepCache(tmp_path, KEY, [Need(many, (((0, 512),),))], turn)
    numbers_of = [torch.randn(512, 10) for _ in range(2)]
    for step in range(2):
        assert not cache.begin(step)
        cache.put(many, 0, numbers_of[step])
    cache.confirm(2)
    cache.flush()
    cache.close()
    (part,) = [Part(path, KEY.name, 0) for path in parts(tmp_path)]
    assert {piece.rows for piece in part.values[many.id].pieces} == {64}
    cache = StepCache(tmp_path, KEY, [Need(many, (((100, 3), (126, 4)),))], turn)
    for step in range(2):
        assert cache.begin(step)
        found = cache.numbers(many)
        assert torch.equal(found, torch.cat([numbers_of[step][100:103], numbers_of[step][126:130]]))
        assert found.untyped_storage().nbytes() == 7 * 10 * 4
    cache.close()


def test_a_part_can_be_opened_with_safetensors(tmp_path):
    from safetensors import safe_open

    train(tmp_path, 2)
    with safe_open(parts(tmp_path)[0], framework="pt") as file:
        assert torch.equal(file.get_tensor("0"), torch.cat([numbers(0), numbers(1)]))
        described = json.loads(file.metadata()["dkd_teacher_cache"])
    (value,) = described["values"].values()
    assert [piece[:2] for piece in value["pieces"]] == [[start, 2] for start in range(0, 16, 2)]
