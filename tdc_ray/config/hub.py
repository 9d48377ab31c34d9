"""Names of what is on the Hugging Face hub: ``OWNER/NAME``, and which commit of it."""

import re
from pathlib import Path
from typing import Literal, NamedTuple, Self

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""Owner and name of a repository."""

HUB_SECONDS = 10
"""How long the hub has to answer whether it has something."""

_REVISION = r"(?:@(\w[\w./-]*))?"
_BASE = re.compile(f"({HUB_NAME.pattern}){_REVISION}")
_DATASET = re.compile(rf"({HUB_NAME.pattern}){_REVISION}(?::(\w[\w.-]*))?")
_COMMIT = re.compile("[0-9a-f]{40}")


class HubName(NamedTuple):
    """A repository, and what of it is meant."""

    repository: str
    """OWNER/NAME."""

    revision: str | None = None
    """Commit, tag or branch; None means the newest."""

    config_name: str | None = None
    """Of a data set."""

    def __str__(self) -> str:
        marked = zip(("", "@", ":"), self, strict=True)
        return "".join(f"{mark}{part}" for mark, part in marked if part is not None)

    @property
    def commit(self) -> str | None:
        """The commit, if the revision is one."""
        is_commit = self.revision is not None and _COMMIT.fullmatch(self.revision)
        return self.revision if is_commit else None

    def at(self, commit: str) -> Self:
        """Return the name with the commit that was taken, unless a revision is named.

        A branch or tag stays, too, and may be another commit later.
        """
        return self._replace(revision=self.revision or commit)


def hub_base(name: str) -> HubName | None:
    """Return the parts of ``OWNER/NAME@REVISION``; None where it is no such name."""
    match = _BASE.fullmatch(name)
    return None if match is None else HubName(match[1], match[2])


def hub_dataset(name: str) -> HubName | None:
    """Return the parts of ``OWNER/NAME@REVISION:CONFIG``; None where a path is meant.

    What lies, or would lie, in a folder that is here is a path.
    """
    match = _DATASET.fullmatch(name)
    if match is None or Path(match[1]).parent.exists():
        return None
    return HubName(match[1], match[2], match[3])


def not_available(named: str, kind: Literal["model", "dataset"], error: Exception) -> str:
    """Write that what is named is neither here nor on the hub, why, and the way out."""
    lines = str(error).splitlines() or [type(error).__name__]
    if kind == "model":
        return (
            f"{named} is neither a folder here nor available from the Hugging Face hub: "
            f"{lines[0].rstrip('.')}. Download it where there is a network, and give its folder."
        )
    return (
        f"{named} is neither a path here nor a data set that the Hugging Face hub gives now: "
        f"{' '.join(' '.join(lines).split()).rstrip('.')}. Mend the name (OWNER/NAME, "
        "OWNER/NAME@REVISION or OWNER/NAME:CONFIG), or save the data set where there is a "
        "network, by its save_to_disk, and name that folder."
    )


def with_recorded_commit(name: str, before: str | None) -> str:
    """Return a name with the commit that an earlier call recorded, where no revision is named.

    Args:
        name: Of a data set, a base, or a path, which stays.
        before: The name that the earlier call recorded; None means that there was none.
    """
    asked, taken = _DATASET.fullmatch(name), _DATASET.fullmatch(before or "")
    is_same = asked and taken and asked[2] is None and asked.group(1, 3) == taken.group(1, 3)
    return before if before is not None and is_same else name
