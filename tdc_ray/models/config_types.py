"""Types of settings that the files of networks' configs have in common."""

from typing import Annotated

from pydantic import Field

Size = Annotated[int, Field(ge=1, le=4096)]
Width = Annotated[int, Field(ge=1, le=65_536)]
