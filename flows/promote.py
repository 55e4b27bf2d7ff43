"""Make a model version the champion, if the gate lets it: `python -m flows.promote`, or deployment `promote/champion`.

Exit status by hand: 0 = it is the champion, 3 = the gate refused it, 1 = an error.
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds and computes its folders
    from flows import command_line

    ARGUMENTS = command_line.read(command_line.promote)

import sys
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from flows import experiment
from flows.local import by_hand
from flows.register import server_away
from segmentation.errors import PipelineError
from segmentation.names import markdown as escaped
from segmentation.names import one_line
from segmentation.paths import project_root
from segmentation.progress import lines_to
from segmentation.registry import aliases
from segmentation.registry.client import MODEL_NAME
from segmentation.settings import PromoteSettings, load_settings

if TYPE_CHECKING:
    from segmentation.registry.promotion import Contest

OUTCOMES = {"promote": "Promoted", "refuse": "Refused", "keep": "Unchanged"}


@flow(name="promote")
def promote(candidate: str = "challenger", force_reason: str | None = None) -> dict[str, Any]:
    """Measure a version and the champion side by side, write down the decision, and move the alias only on evidence.

    A refusal is an answer and not a failure: the run ends completed, in the state "Refused".

    Args:
        candidate: the version to promote: its number, or an alias; "challenger" is the newest.
        force_reason: promote it whatever the comparison says, for this reason, which is recorded; leave it out to let
            the gate decide. A stored model that does not give its own masks again is refused even so.

    Returns:
        The decision, as it is recorded.
    """
    from segmentation.registry.promotion import contest

    if force_reason is not None:
        force_reason = checked_reason("force_reason", force_reason, "say why the gate is overridden, or leave it out")
    settings = load_settings(project_root() / "params.yaml").promote
    found = contest(candidate)
    decision = decide(found, settings, force_reason)
    version, champion = decision["candidate"]["version"], decision["champion"]
    why = record(version, "decision", decision)
    publish(decision, why)
    if decision["verdict"] == "promote":
        move(version, champion["version"] if champion else None, why)
    text = f"version {version}: {'; '.join(decision['reasons'])}"
    state: Any = Completed(name=OUTCOMES[decision["verdict"]], message=text, data=decision)  # callers get the data
    return state


def checked_reason(name: str, reason: str, remedy: str) -> str:
    """A reason for the record, on one line.

    Raises:
        PipelineError: it is empty, or holds characters that are not seen.
    """
    try:
        line = one_line(reason)
    except ValueError as error:
        raise PipelineError(f"{name}: {error}") from None
    if not line:
        raise PipelineError(f"{name}: is empty; {remedy}")
    return line


@task(cache_policy=NO_CACHE)
def decide(found: Contest, settings: PromoteSettings, force_reason: str | None) -> dict[str, Any]:
    """Both models on the val photos that DVC keeps at the candidate's commit, whatever lies in `data/` now."""
    from segmentation.registry.promotion import decide

    pairs = experiment.evaluation_set(found.candidate.tags["experiment_commit"])
    with lines_to(get_run_logger().info):
        return decide(found, pairs, settings, force_reason)


@task(cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, retry_condition_fn=server_away)
def record(version: str, kind: str, content: dict[str, Any]) -> str:
    """Why, to the MLflow run of a version; a tracking server that is away is tried again."""
    return aliases.record(version, kind, content)


@task(cache_policy=NO_CACHE)
def publish(decision: dict[str, Any], why: str) -> None:
    """The decision as a Prefect artifact, and in the log."""
    log = get_run_logger()
    version = decision["candidate"]["version"]
    for reason in decision["reasons"]:
        log.info("%s, version %s: %s", decision["verdict"], version, reason)
    create_markdown_artifact(
        key="promotion-decision",
        description=f"{decision['verdict']} version {version}",
        markdown=_markdown(decision, why),
    )


@task(cache_policy=NO_CACHE)
def move(champion: str, expected: str | None, why: str) -> dict[str, str]:
    """The aliases, after a second look at the champion; not tried again: who overtook this run has the last word."""
    held = aliases.move(champion, expected, why)
    get_run_logger().info("aliases: %s", ", ".join(f"{alias} {version}" for alias, version in sorted(held.items())))
    return held


def _markdown(decision: dict[str, Any], why: str) -> str:
    champion = decision["champion"]
    against = f"champion version {champion['version']}" if champion else "no champion"
    lines = [
        f"# {decision['verdict']}: version {decision['candidate']['version']} against {against}",
        "",
        *(f"- {escaped(reason)}" for reason in decision["reasons"]),
        "",
        f"{decision['branch']} · {decision['at']} · {escaped(decision['by'])} · `{why}`",
    ]
    if "checks" in decision:
        lines += ["", "| check | | |", "|---|---|---|"]
        lines += [
            f"| {check['name']} | {'passed' if check['passed'] else '**failed**'} | {escaped(check['says'])} |"
            for check in decision["checks"]
        ]
        lines += ["", "| | mIoU | seconds a photo |", "|---|---|---|"]
        lines += [
            f"| {role} | {scores['miou']:.4f} | {scores['seconds']:.4f} |"
            for role, scores in sorted(decision["scores"].items())
        ]
    if decision.get("comparison"):
        lines += ["", "| class | champion | candidate | difference | interval |", "|---|---|---|---|---|"]
        lines += [
            f"| {escaped(found['name'])} | {found['champion']:.4f} | {found['candidate']:.4f} | "
            f"{found['difference']:+.4f} | "
            + (f"{found['low']:+.4f} … {found['high']:+.4f} |" if found["low"] is not None else "too few photos |")
            for found in sorted(decision["comparison"]["classes"], key=lambda found: found["difference"])
        ]
    return "\n".join(lines)


def main(version: str, force_reason: str | None) -> None:
    """Run the flow by hand, and say what came of it."""
    with by_hand():
        decision = promote(version, force_reason)
    print(f"{OUTCOMES[decision['verdict']]}: models:/{MODEL_NAME}/{decision['candidate']['version']}")
    for reason in decision["reasons"]:
        print(f"  {reason}")
    sys.exit(3 if decision["verdict"] == "refuse" else 0)


if __name__ == "__main__":
    main(*ARGUMENTS)
