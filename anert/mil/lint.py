"""The engine's published constraints (lint_rules.py) checked against MIL text or a Function: findings with a fix each.

Severity says what happens (`error`: refused or wrong numbers; `warning`: some machine or size is at risk; `note`:
slower), confidence whether sources agree. We have seen none of it on an engine: every rule names who reported it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from anert.errors import AnertError, InputError, ShapeError, UnsupportedError
from anert.mil.graph import Function
from anert.mil.lint_rules import CHIPS, RULES, TEXT_RULES, Rule, catalogue
from anert.mil.parser import parse
from anert.mil.syntax import Program, parse_syntax

_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One constraint that a program breaks, on the chips of `targets`. Line and column are 0 without a text."""

    rule: str
    severity: str
    confidence: str
    targets: tuple[str, ...]
    message: str
    value: str
    source: str
    fix: str
    line: int = 0
    column: int = 0


def lint(function: Function, target: str | Sequence[str] = CHIPS) -> list[Finding]:
    """What of the catalogue a Function breaks on one chip or on several (`m1` to `m5`), errors first.

    Raises InputError for an unknown chip."""
    targets = _targets(target)
    found = [
        f for rule in RULES for value, message in rule.check(function) for f in _findings(rule, targets, value, message)
    ]
    return _sorted(found)


def lint_text(
    text: str,
    target: str | Sequence[str] = CHIPS,
    source: str = "<mil>",
    blobs: Mapping[str, bytes] | None = None,
) -> list[Finding]:
    """Findings of a MIL text with line and column, also those that only a text can have (missing names, ops that anert
    does not know). Weight files need not be there. Raises MILSyntaxError or InputError if it is no MIL text."""
    targets = _targets(target)
    tree = parse_syntax(text, source)
    found: list[Finding] = []
    for text_rule in TEXT_RULES:
        for token, value, message in text_rule.check(tree):
            line, column = tree.position(token)
            found += _findings(text_rule, targets, value, message, line, column)
    try:
        module = parse(text, source, blobs, placeholders=True)
    except (ShapeError, UnsupportedError) as error:
        return _sorted([*found, _unread(error, targets)])
    for function in module.functions.values():
        places = _places(tree, function.name)
        for finding in lint(function, targets):
            line, column = tree.position(places.get(finding.value, 0))
            found.append(Finding(**{**asdict(finding), "line": line, "column": column}))
    return _sorted(found)


def _targets(target: str | Sequence[str]) -> tuple[str, ...]:
    targets = tuple(target.split(",")) if isinstance(target, str) else tuple(target)
    for chip in targets:
        if chip not in CHIPS:
            raise InputError(f"no chip is called {chip!r}: expected some of {', '.join(CHIPS)}")
    return targets


def _findings(
    rule: Rule[Any], targets: Sequence[str], value: str, message: str, line: int = 0, column: int = 0
) -> Iterable[Finding]:
    """A finding for each severity and confidence that the rule has among the targets."""
    levels: dict[tuple[str, str], list[str]] = {}
    for chip in targets:
        if chip in rule.levels:
            levels.setdefault(rule.levels[chip], []).append(chip)
    for (severity, confidence), chips in levels.items():
        yield Finding(rule.id, severity, confidence, tuple(chips), message, value, rule.source, rule.fix, line, column)


def _unread(error: AnertError, targets: tuple[str, ...]) -> Finding:
    """What anert itself cannot read: the rest of the program went unchecked, which is no verdict about the engine."""
    message = f"the graph could not be checked: {error}"
    fix = "rewrite what the message names; only the rules about the text were applied"
    return Finding("ANE000", "warning", "agreed", targets, message, "", "anert", fix)


def _places(tree: Program, function: str) -> dict[str, int]:
    """The token that defines each value of a function."""
    places: dict[str, int] = {}
    for syntax in tree.functions:
        if syntax.name == function:
            places.update((formal.name, formal.token) for formal in syntax.params)
            places.update((formal.name, formal.token) for s in syntax.statements for formal in s.outputs)
    return places


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda f: (_ORDER[f.severity], f.confidence, f.line, f.column, f.rule))


def measured(findings: Iterable[Finding], rules: Mapping[str, bool]) -> list[Finding]:
    """Findings as they stand on a probed machine: `rules` (Capabilities.rules) drops what a probe has refuted there;
    what it has confirmed is no longer disputed."""
    kept = (f for f in findings if rules.get(f.rule, True))
    return _sorted(replace(f, confidence="measured") if f.rule in rules else f for f in kept)


def as_text(findings: Sequence[Finding], path: str = "<mil>") -> str:
    """A paragraph a finding: place, severity, rule, message; below it the fix and who reported it."""
    lines = []
    for f in findings:
        place = f"{path}:{f.line}:{f.column}" if f.line else f"{path}: {f.value}" if f.value else path
        doubt = "" if f.confidence == "agreed" else f" ({f.confidence})"
        lines.append(f"{place}: {f.severity}{doubt} {f.rule} [{','.join(f.targets)}]: {f.message}")
        lines.append(f"    fix: {f.fix}  (source: {f.source})")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The findings as plain dictionaries."""
    return [{**asdict(f), "targets": list(f.targets)} for f in findings]


def as_sarif(findings: Sequence[Finding], path: str = "<mil>") -> dict[str, Any]:
    """A SARIF 2.1.0 log, as code hosts and editors read it."""
    rules = [
        {
            "id": rule.id,
            "name": rule.name,
            "shortDescription": {"text": rule.summary},
            "help": {"text": f"{rule.fix} (source: {rule.source})"},
        }
        for rule in catalogue()
    ]
    results = [
        {
            "ruleId": f.rule,
            "level": f.severity,
            "message": {"text": f"{f.message}. Fix: {f.fix}"},
            "locations": [_location(f, path)],
            "properties": {"confidence": f.confidence, "targets": list(f.targets)},
        }
        for f in findings
    ]
    driver = {"name": "anert lint", "informationUri": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/", "rules": rules}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return {"$schema": schema, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _location(finding: Finding, path: str) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": path}}
    if finding.line:
        physical["region"] = {"startLine": finding.line, "startColumn": finding.column}
    logical = [{"name": finding.value, "kind": "variable"}] if finding.value else []
    return {"physicalLocation": physical, "logicalLocations": logical}
