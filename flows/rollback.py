"""Return to the champion before this one: `python -m flows.rollback REASON`, or deployment `rollback/champion`."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and computes its folders
    from flows import command_line

    ARGUMENTS = command_line.read(command_line.rollback)

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from flows.local import by_hand
from flows.promote import checked_reason, move, record
from segmentation.errors import PipelineError
from segmentation.names import markdown
from segmentation.registry import aliases
from segmentation.registry.client import MODEL_NAME


@flow(name="rollback")
def rollback(reason: str) -> dict[str, str]:
    """Make the version at `previous` the champion again, and the champion `previous`; once more undoes it.

    Args:
        reason: why, for the record.

    Returns:
        The version that each alias is on.
    """
    reason = checked_reason("reason", reason, "say why the champion is taken back")
    held = aliases.read()
    champion, previous = held.get("champion"), held.get("previous")
    if previous is None or previous == champion:
        raise PipelineError(
            f"models:/{MODEL_NAME}@previous: {'is the champion itself' if previous else 'no version has this alias'}, "
            "so there is nothing to return to; `python -m flows.promote --version N` asks the gate about any version"
        )
    content = {**aliases.stamp(), "reason": reason, "from": champion, "to": previous, "aliases": held}
    why = record(champion or previous, "rollback", content)  # on the version that is taken back
    create_markdown_artifact(
        key="rollback",
        description=f"version {champion} back to {previous}",
        markdown=f"# Rollback from version {champion} to {previous}\n\n{markdown(reason)}\n\n`{why}`",
    )
    moved = move(previous, champion, why)
    message = f"version {previous} is the champion again, instead of {champion}: {reason}"
    state: Any = Completed(name="Rolled back", message=message, data=moved)  # callers get the data
    return state


def main(reason: str) -> None:
    """Run the flow by hand, and say what came of it."""
    with by_hand():
        moved = rollback(reason)
    print(f"champion: models:/{MODEL_NAME}/{moved['champion']}, previous: models:/{MODEL_NAME}/{moved['previous']}")


if __name__ == "__main__":
    main(ARGUMENTS)
