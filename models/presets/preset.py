"""What a name of the zoo stands for."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from dsmoe_compiler.models.decoder_config import DecoderConfig

Config_co = TypeVar("Config_co", bound=DecoderConfig, covariant=True)


@dataclass(frozen=True)
class Preset(Generic[Config_co]):
    """A model of the zoo: one line about it, and its sizes."""

    description: str
    config: Config_co
