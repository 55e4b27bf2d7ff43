"""What the server answers, as JSON and in OpenAPI."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class SegmentationClass(BaseModel):
    """A class of the model."""

    id: int = Field(description="the pixel value in a mask", ge=0, le=254, examples=[12])
    name: str = Field(examples=["dog"])
    colour: str = Field(description="in a mask's palette", pattern="^#[0-9a-f]{6}$", examples=["#400080"])


class ClassShare(SegmentationClass):
    """A class that is in a photo."""

    share: float = Field(description="of the photo's pixels", gt=0, le=1, examples=[0.25])


class Segmentation(BaseModel):
    """What is in a photo."""

    model_version: str = Field(description="the version that predicted", examples=["3"])
    width: int = Field(description="of the upright photo, pixels", ge=1, examples=[500])
    height: int = Field(description="of the upright photo, pixels", ge=1, examples=[375])
    classes: list[ClassShare] = Field(description="those present, the largest first")


class Model(BaseModel):
    """The model that is served."""

    name: str = Field(examples=["voc-segmentation"])
    version: str = Field(examples=["3"])
    aliases: list[str] = Field(examples=[["champion"]])
    encoder: str = Field(examples=["vit_base_patch14_dinov2"])
    image_size: int = Field(description="the side that a photo is resized to, pixels", ge=1, examples=[518])
    classes: list[SegmentationClass]
    metrics: dict[str, float] = Field(description="scores at registration", examples=[{"miou": 0.8}])
    tags: dict[str, str] = Field(description="lineage", examples=[{"git_commit": "f9d5ce1"}])


class Health(BaseModel):
    """Whether photos are being predicted, and with the model that they should be."""

    status: Literal["ok", "degraded", "stuck"]
    model_version: str = Field(examples=["3"])
    waiting: int = Field(description="photos in the queue", ge=0, examples=[0])
    detail: str | None = Field(description="what is wrong, unless `ok`", examples=[None])


class Fault(BaseModel):
    """Why a request was not served."""

    detail: str = Field(examples=["this is neither a JPEG nor a PNG photo"])
