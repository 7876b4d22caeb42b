"""The section of a teacher's cache: where the outputs of a teacher are stored and read."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from dkd.config.key_types import LONGEST_NAME, Section, Switch, allow, fits_file_system, matches, one_line

_TOP = "topk:"


def _is_store(value: Any) -> bool:
    return value in ("exact", "bf16") or matches(r"topk:[1-9][0-9]{0,8}", value)


class CacheSection(Section):
    """Set where what the losses read of a teacher is stored, and read in later runs. `teacher.cache: DIR` is short for
    `teacher.cache: {dir: DIR}`. See docs/guides/teach_once.md."""

    dir: Annotated[
        str,
        Field(min_length=1),
        AfterValidator(one_line),
        allow(fits_file_system, f"a path with names of at most {LONGEST_NAME} bytes"),
    ]
    """Folder of the cache, on a file system that all ranks share. Several runs may fill and read one folder at the same
    time."""
    fill: Switch = True
    """Whether what is not there is computed and stored. false: a run whose teacher outputs are not there is refused,
    and nothing is written."""
    features: Switch = False
    """Whether maps of features are stored, too, for the losses that compare them (fitnet, feature, vkd, vid, review).
    They are large; false: such a loss is refused. Vectors, attention maps, relations and logits need no permission."""
    store: Annotated[str, allow(_is_store, "exact, bf16 or topk:N, such as topk:10")] = "exact"
    """exact: everything in the type in which it was computed, so that training is the same to the last bit. bf16: what
    is float32 is rounded to bfloat16. topk:N: of each sample's logits the N largest are stored, and the others become
    equal, with the same sum of probabilities. The last two are approximations: `dkd cache verify` measures them."""

    @model_validator(mode="before")
    @classmethod
    def _dir_alone(cls, data: Any) -> Any:
        return {"dir": data} if isinstance(data, str) else data

    @property
    def top(self) -> int | None:
        """Return N of `topk:N`; None: all logits are stored."""
        return int(self.store.removeprefix(_TOP)) if self.store.startswith(_TOP) else None
