"""`params.yaml`, read once into typed, frozen settings.

Nothing else in the project reads the file. An unknown key, a wrong type or an impossible combination is refused with
the key, the value and the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from segmentation.errors import PipelineError

PARAMS_FILE = Path("params.yaml")


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FetchSettings(Section):
    source: Literal["voc2012", "directory", "sample"]
    archive: str | None
    url: str
    md5: str = Field(pattern="^[0-9a-f]{32}$")
    directory: Any = None  # looked at only where it is used
    limit: int | None = Field(ge=1)

    @model_validator(mode="after")
    def _directory_is_a_path(self) -> FetchSettings:
        if self.source == "directory" and not (isinstance(self.directory, str) and self.directory.strip()):
            found = f"{self.directory!r} is no path" if self.directory is not None else "is not set"
            hint = f"; put it in quotes: '{self.directory}'" if type(self.directory) in (int, float) else ""
            raise ValueError(
                f"directory: {found}{hint}; source: directory needs the folder with your photos (docs/own-data.md)"
            )
        return self


class PreprocessSettings(Section):
    image_size: int = Field(ge=1)


class ValidateSettings(Section):
    max_void_share: float = Field(gt=0, le=1)


class EncoderSettings(Section):
    name: str
    pretrained: bool
    checkpoint: str | None
    trainable_blocks: Annotated[int, Field(ge=0)] | Literal["all"]

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels as timm's name states it, None where it does not."""
        found = re.search(r"patch(\d+)", self.name)
        return int(found[1]) if found else None


class DecoderSettings(Section):
    type: Literal["unet", "linear"]
    channels: list[Annotated[int, Field(ge=1)]] = Field(min_length=4, max_length=4)
    norm: Literal["batch", "group", "layer"]
    skip_connections: list[Annotated[int, Field(ge=0)]] = Field(max_length=3)


class EncodeSettings(Section):
    cache: bool


class TrainSettings(Section):
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    accumulate: int = Field(ge=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    encoder_lr_scale: float = Field(gt=0)
    layer_decay: float = Field(gt=0, le=1)
    schedule: Literal["constant", "cosine", "onecycle", "poly"]
    warmup_epochs: int = Field(ge=0)
    gradient_clip: Annotated[float, Field(gt=0)] | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    lovasz_softmax: float = Field(ge=0)
    cross_entropy: float = Field(ge=0)
    dice: float = Field(ge=0)
    focal: float = Field(ge=0)
    class_weights: Literal["none", "median_frequency"]
    horizontal_flip: float = Field(ge=0, le=1)
    scale: Annotated[list[Annotated[float, Field(ge=0.1, le=10)]], Field(min_length=2, max_length=2)] | None
    colour_jitter: float = Field(ge=0, le=1)
    keep: Literal["best", "last"]
    panel_epochs: list[Annotated[int, Field(ge=1)]]
    seed: int = Field(ge=0, lt=2**32)
    workers: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> TrainSettings:
        if self.lovasz_softmax + self.cross_entropy + self.dice + self.focal == 0:
            raise ValueError("every loss has weight 0; the report has lovasz_softmax: 1.0")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs} leaves none of {self.epochs} epochs; lower it")
        if self.scale and self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: {self.scale} is no range; write [smallest, largest]")
        return self

    def never_twice(self) -> str | None:
        """Why no photo is seen twice in the same way, None where each is."""
        if self.scale is not None:
            return "train.scale shows another crop of each photo in every epoch"
        if self.colour_jitter > 0:
            return "train.colour_jitter shows other colours of each photo in every epoch"
        return None


class EvaluateSettings(Section):
    panels: int = Field(ge=1, le=100)
    flip: bool
    scales: list[Annotated[float, Field(ge=0.25, le=4)]] = Field(min_length=1)
    sliding_window: bool

    @model_validator(mode="after")
    def _no_scale_counts_twice(self) -> EvaluateSettings:
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales: {self.scales} names one twice; each counts once")
        return self


class PromoteSettings(Section):
    min_gain: float = Field(ge=-1, le=1)
    max_class_drop: float = Field(ge=0, le=1)
    max_latency_ratio: float = Field(gt=0)


class Settings(Section):
    fetch: FetchSettings
    preprocess: PreprocessSettings
    validate_: ValidateSettings = Field(alias="validate")
    encoder: EncoderSettings
    decoder: DecoderSettings
    encode: EncodeSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    promote: PromoteSettings

    @model_validator(mode="after")
    def _size_is_a_multiple_of_the_patch(self) -> Settings:
        size, patch = self.preprocess.image_size, self.encoder.patch_size
        if patch and size % patch:
            nearest = max(patch, round(size / patch) * patch)
            raise ValueError(
                f"preprocess.image_size: {size} is no multiple of the {patch}-pixel patch of {self.encoder.name}; "
                f"the nearest valid size is {nearest}"
            )
        return self

    def not_cached(self) -> str | None:
        """Why what the frozen part of the encoder yields is not kept, None where it is."""
        cases = [
            (not self.encode.cache, "encode.cache is false"),
            (
                self.encoder.trainable_blocks == "all",
                "encoder.trainable_blocks is all: nothing is frozen",
            ),
        ]
        return next((reason for holds, reason in cases if holds), self.train.never_twice())

    def without_effect(self) -> list[str]:
        """What is set, but changes nothing: one line each, with the reason."""
        encoder, decoder, train = self.encoder, self.decoder, self.train
        cases = [
            (train.encoder_lr_scale != 1 and encoder.trainable_blocks == 0,
             "train.encoder_lr_scale: encoder.trainable_blocks is 0, so nothing of the encoder is trained"),
            (train.layer_decay != 1 and encoder.trainable_blocks in (0, 1),
             f"train.layer_decay: {encoder.trainable_blocks} encoder blocks are trained; it needs at least 2"),
            (decoder.type == "linear" and (decoder.norm != "batch" or bool(decoder.skip_connections)),
             "decoder.norm, decoder.skip_connections: decoder.type is linear, which has neither"),
            (train.class_weights != "none" and train.cross_entropy == 0,
             "train.class_weights: train.cross_entropy, which they weigh, is 0"),
            (train.warmup_epochs > 0 and train.schedule == "onecycle",
             "train.warmup_epochs: the onecycle schedule has its own warm-up"),
        ]  # fmt: skip
        return [f"{text}; it has no effect" for holds, text in cases if holds]


def load_settings(
    path: Path = PARAMS_FILE, overrides: Mapping[str, Any] | None = None, named: str = "overrides"
) -> Settings:
    """Read and check all settings.

    Args:
        path: the YAML file.
        overrides: values by dotted key (`{"train.epochs": 2}`) that replace those of the file.
        named: where the overrides come from, as the user knows it: messages about them begin with it.

    Raises:
        PipelineError: the file is missing or unreadable, or a value is refused; all refusals are listed.
    """
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # YAML 1.2, as DVC reads it: 1e-4 is a number
    except FileNotFoundError:
        raise PipelineError(f"{path}: not found; run from the project's folder") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise PipelineError(f"{path}: expected one section per stage, found {type(values).__name__}")
    changed = _with(values, overrides or {}, named)
    try:
        return Settings.model_validate(changed)
    except ValidationError as error:
        refused = _refusals(error)
    try:  # what is wrong without the overrides is wrong in the file
        Settings.model_validate(values)
        of_file = []
    except ValidationError as error:
        of_file = _refusals(error)
    of_overrides = [line for line in refused if line not in of_file]
    blocks = [(path, [line for line in refused if line in of_file]), (named, of_overrides)]
    raise PipelineError("\n".join("\n".join([f"{source}: refused", *lines]) for source, lines in blocks if lines))


def _with(values: dict[str, Any], overrides: Mapping[str, Any], named: str) -> dict[str, Any]:
    changed = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in values.items()}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if not isinstance(changed.get(section, {}), dict) or not name:
            raise PipelineError(f"{named}: {key!r} is no key; write it as section.key, for example {_nearest_key(key)}")
        changed.setdefault(section, {})[name] = value
    return changed


def _refusals(error: ValidationError) -> list[str]:
    """A line for each key."""
    reasons: dict[str, list[str]] = {}  # a value that may be of two types has one for each
    for item in error.errors():
        key, reason = _explain(item)
        reasons.setdefault(key, []).append(reason)
    return [f"  {key}: " * bool(key) + "; or: ".join(listed) for key, listed in reasons.items()]


def _nearest_key(key: str) -> str:
    """The nearest dotted key, of another section when the name fits better there."""
    section, _, name = key.rpartition(".")
    sections = [field.alias or own for own, field in Settings.model_fields.items()]
    found = max(
        ((of, own) for of in sections for own in _section(of).model_fields),
        key=lambda pair: _likeness(pair[1], name) + 0.3 * _likeness(pair[0], section),
    )
    return ".".join(found)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _explain(item: Any) -> tuple[str, str]:
    """The key of one refusal of pydantic's, and why: the value, and the nearest valid one."""
    # without pydantic's names for the members of a union
    location = [
        str(part) for part in item["loc"] if not re.match(r"constrained-|literal\[|list\[|float$|int$", str(part))
    ]
    key, value, context = ".".join(location), item["input"], item.get("ctx", {})
    if item["type"] == "extra_forbidden":
        sections = [field.alias or name for name, field in Settings.model_fields.items()]
        meant = _nearest_key(key) if len(location) > 1 else max(sections, key=lambda name: _likeness(name, key))
        return key, f"unknown key (value {value!r}); did you mean {meant}?"
    if item["type"] == "missing":
        return key, "missing; the default is in the repository's params.yaml"
    if item["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", context["expected"])
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)
        return key, f"{value!r} is not one of {', '.join(choices)}; the nearest is {near[0]}"
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, words in bounds.items():
        if name in context:
            return key, f"{value!r} is out of range; it must be {words} {context[name]}"
    if item["type"] == "value_error":
        return key, str(context["error"])
    return key, f"{value!r} is refused: {item['msg']}" + _nearest_of_type(item["type"], value)


def _section(name: str) -> type[BaseModel]:
    fields = {field.alias or key: field for key, field in Settings.model_fields.items()}
    annotation = fields[name].annotation
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _nearest_of_type(kind: str, value: Any) -> str:
    try:
        if kind == "string_type" and value is not None:
            return f"; put it in quotes: '{value}'"
        if kind == "int_type":
            return f"; the nearest valid value is {round(float(value))}"
        if kind == "float_type":
            return f"; the nearest valid value is {float(value)}"
    except (TypeError, ValueError):
        pass
    return ""
