"""Data checks: Great Expectations judges the table of masks; the outcome as JSON, as text and as Data Docs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from segmentation.checks.rules import Offender, Rule, Severity, rules
from segmentation.checks.table import MaskRow, build_rows, read_manifest, to_frame
from segmentation.data.palettes import Reference
from segmentation.data.voc import SPLITS
from segmentation.errors import PipelineError
from segmentation.files import sha256_json
from segmentation.progress import Progress

SHOWN_OFFENDERS = 20
LONGEST_FINDING = 160


@dataclass(frozen=True)
class RuleResult:
    """How the data fared under one rule; `offenders` are all of them, sorted, each once."""

    rule: str
    severity: Severity
    passed: bool
    says: str
    remedy: str
    offenders: tuple[Offender, ...]


@dataclass(frozen=True)
class SplitFingerprint:
    """What a split consists of: a changed, added or removed photo or mask changes the hash, its order does not."""

    pairs: int
    sha256: str


@dataclass(frozen=True)
class DataChecks:
    """The outcome of all rules. `docs_index` is the first page of the Data Docs, where they were asked for."""

    rules: tuple[RuleResult, ...]
    splits: dict[str, SplitFingerprint]
    docs_index: Path | None

    @property
    def result(self) -> str:
        """ "passed", "passed with warnings" or "failed"."""
        broken = {rule.severity for rule in self.rules if not rule.passed}
        return "failed" if "critical" in broken else "passed with warnings" if broken else "passed"

    def to_json(self) -> dict[str, Any]:
        """The content of `reports/data_checks.json`: the same for the same data, wherever and whenever checked."""
        return {
            "result": self.result,
            "splits": {name: {"pairs": split.pairs, "sha256": split.sha256} for name, split in self.splits.items()},
            "rules": [
                {
                    "rule": rule.rule,
                    "says": rule.says,
                    "severity": rule.severity,
                    "passed": rule.passed,
                    "offenders": len(rule.offenders),
                    "first_offenders": [
                        {"file": offender.file, "found": _shorten(offender.found)}
                        for offender in rule.offenders[:SHOWN_OFFENDERS]
                    ],
                }
                for rule in self.rules
            ],
        }

    def raise_if_critical(self) -> None:
        """Print warnings, then refuse the data if it breaks a critical rule.

        Raises:
            PipelineError: its text lists every offender of every broken critical rule, with the remedy.
        """
        for rule in self.rules:
            if not rule.passed and rule.severity == "warning":
                more = len(rule.offenders) - SHOWN_OFFENDERS
                print("\n".join(["warning: " + _heading(rule), *_lines(rule.offenders[:SHOWN_OFFENDERS])]))
                if more > 0:
                    print(f"    … and {more} more")
        broken = [rule for rule in self.rules if not rule.passed and rule.severity == "critical"]
        if not broken:
            return
        files = {offender.file for rule in broken for offender in rule.offenders}
        text = [f"the data breaks {_count(len(broken), 'critical rule')}; offending files: {len(files)}"]
        for rule in broken:
            text += ["", _heading(rule), *_lines(rule.offenders)]
        if self.docs_index:
            text += ["", f"all rules as a page: {self.docs_index}"]
        raise PipelineError("\n".join(text))


def check_masks(
    processed: Path,
    classes: list[str],
    size: int,
    max_void_share: float,
    docs: Path | None,
    reference: Reference | None = None,
) -> DataChecks:
    """Check every listed pair of `data/processed`, reading every written file back.

    Args:
        processed: what preprocess wrote.
        classes: class names by id.
        size: side that photos and masks must have, pixels.
        max_void_share: a mask with a larger share of void pixels is named in a warning.
        docs: folder for the Data Docs, replaced if it exists; None = no Data Docs.
        reference: what the colors of palette masks stand for; None = they are held to each other alone.

    Raises:
        PipelineError: the manifest is missing or unreadable. A broken rule raises nothing, see `raise_if_critical`.
    """
    manifest = read_manifest(processed / "manifest.parquet")
    rows = build_rows(processed, manifest, len(classes), reference)
    judged = rules(classes, size, max_void_share)
    results = _judge(judged, rows, docs)
    checks = DataChecks(
        rules=tuple(results),
        splits={split: _fingerprint([row for row in manifest if row["split"] == split]) for split in SPLITS},
        docs_index=docs / "index.html" if docs else None,
    )
    pairs = ", ".join(f"{checks.splits[split].pairs} {split}" for split in SPLITS)
    print(f"validate: {pairs} pairs, {len(judged)} rules: {checks.result}")
    return checks


def _judge(judged: Sequence[Rule], rows: Sequence[MaskRow], docs: Path | None) -> list[RuleResult]:
    """Run the rules as one Great Expectations checkpoint, building the Data Docs beside `docs` and then moving them."""
    building = docs.with_name(f".{docs.name}.{os.getpid()}.tmp").absolute() if docs else None
    try:
        outcome = _run_checkpoint(judged, rows, building)
        if docs and building:
            shutil.rmtree(docs, ignore_errors=True)  # every run would add its own pages
            building.rename(docs)
    finally:
        if building:
            shutil.rmtree(building, ignore_errors=True)
    by_name = {result.expectation_config.meta["rule"]: result for result in outcome}
    return [_result(rule, by_name[rule.name], rows) for rule in judged]


def _run_checkpoint(judged: Sequence[Rule], rows: Sequence[MaskRow], docs: Path | None) -> list[Any]:
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    import great_expectations as gx
    from great_expectations.checkpoint import UpdateDataDocsAction
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    site = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    context = gx.get_context(
        mode="ephemeral",
        project_config=DataContextConfig(
            store_backend_defaults=InMemoryStoreBackendDefaults(),
            data_docs_sites={"data_docs": site} if docs else {},
            progress_bars=ProgressBarsConfig(globally=False),
            analytics_enabled=False,
        ),
    )
    asset = context.data_sources.add_pandas(name="processed").add_dataframe_asset(name="masks")
    suite = gx.ExpectationSuite(
        name="segmentation_masks",
        expectations=[
            getattr(gx.expectations, rule.expectation)(
                **rule.arguments,
                severity=rule.severity,
                description=f"{rule.name} ({rule.severity}): {rule.says}",
                notes=f"If broken: {rule.remedy}.",
                meta={"rule": rule.name},
            )
            for rule in judged
        ],
    )
    definition = gx.ValidationDefinition(
        name="masks",
        data=asset.add_batch_definition_whole_dataframe("all"),
        suite=context.suites.add(suite),
    )
    checkpoint = gx.Checkpoint(
        name="data_checks",
        validation_definitions=[context.validation_definitions.add(definition)],
        actions=[UpdateDataDocsAction(name="data_docs")] if docs else [],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["split", "id"]},
    )
    checkpoint = context.checkpoints.add(checkpoint)
    with Progress("validate: judge"):
        outcome = checkpoint.run(batch_parameters={"dataframe": to_frame(rows)})
    (result,) = outcome.run_results.values()
    return list(result.results)


def _result(rule: Rule, outcome: Any, rows: Sequence[MaskRow]) -> RuleResult:
    if outcome.success:
        return RuleResult(rule.name, rule.severity, True, rule.says, rule.remedy, ())
    index = outcome.result.get("unexpected_index_list")
    broken = {(entry["split"], entry["id"]) for entry in index or []}
    offending = [row for row in rows if index is None or (row.split, escape(row.id)) in broken]
    offenders = tuple(sorted(set(rule.describe(offending))))
    if not offenders:  # an expectation that could not be computed counts as failed, too: that is a fault of ours
        raise RuntimeError(f"rule {rule.name} failed without an offender: {outcome.exception_info}")
    return RuleResult(rule.name, rule.severity, False, rule.says, rule.remedy, offenders)


def _fingerprint(pairs: Sequence[dict[str, Any]]) -> SplitFingerprint:
    hashes = sorted((row["id"], row["image_sha256"] or "", row["mask_sha256"] or "") for row in pairs)
    return SplitFingerprint(len(pairs), sha256_json(hashes))


def _heading(rule: RuleResult) -> str:
    return f"{rule.rule}: {rule.says}\n  what to do: {rule.remedy}"


def _lines(offenders: Sequence[Offender]) -> list[str]:
    width = max((len(offender.file) for offender in offenders), default=0)
    return [f"    {offender.file:<{width}}  {_shorten(offender.found)}" for offender in offenders]


def _shorten(found: str) -> str:
    found = " ".join(found.split())
    return found if len(found) <= LONGEST_FINDING else found[: LONGEST_FINDING - 1] + "…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
