"""From the results of a run to tables in Markdown, and those into the documents that have a
place for them: between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from imcl_fast.runs.files import write

from . import allocator, targets
from .rows import OPERATIONS
from .step import FUSED as FUSED_WAYS
from .step import PLAIN

FUSED = ("cpp", "triton", "cuda")
SHOWN = ("cpp", "triton", "cuda", "torch", "reference", "torch.compile(torch)",
         "torch.compile(reference)")  # fmt: skip
HEADLINES = (
    "representation R18 float32",
    "representation R18 float32 centred",
    "kernel R18 float32",
    "consistency 5 x 128 x 1000 float32",
)

NOT_YET = "Not measured yet.\n"
TELLING = 0.05  # between an overhead's quartiles, at most, where a run can tell how large it is

Results = Mapping


class MarkerError(ValueError):
    """A document's markers don't fit the tables that there are."""


def fill(path: Path, results: Results) -> list[str]:
    """``fill_places`` with all tables of ``results``."""
    return fill_places(path, "bench", {name: partial(t, results) for name, t in TABLES.items()})


def fill_places(path: Path, kind: str, tables: Mapping[str, Callable[[], str]]) -> list[str]:
    """Put tables into a document; the names of those that it has places for.

    Args:
        kind: what the markers begin with, ``<!-- kind:NAME -->``.
        tables: what makes each table, by its name.

    Raises:
        MarkerError: a place has a name that no table has, or does not end.
    """
    text = path.read_text(encoding="utf-8")
    places = marked(kind)
    opened = re.findall(rf"<!-- {kind}:([a-z0-9:-]+) -->", text)
    closed = [match[2] for match in places.finditer(text)]
    if opened != closed:
        raise MarkerError(f"{path.name}: expected <!-- /{kind}:NAME --> after each of {opened}, "
                          f"found it after {closed}")  # fmt: skip
    for name in opened:
        if name not in tables:
            raise MarkerError(f"{path.name}: expected one of {', '.join(tables)}, got {name!r}")
    filled = places.sub(lambda m: m[1] + tables[m[2]]().rstrip("\n") + "\n" + m[4], text)
    if filled != text:
        write(path, filled.encode())
    return opened


def marked(kind: str) -> re.Pattern[str]:
    """Matches a place for a table: its opening marker, name, content and closing marker."""
    return re.compile(
        rf"(<!-- {kind}:([a-z0-9:-]+) -->\n)(.*?)(<!-- /{kind}:\2 -->)", re.DOTALL
    )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def milliseconds(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"


def mebibytes(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**20:.0f}" if count >= 2**20 else "<1"


def percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:+.1f} %"


def machine(results: Results) -> str:
    """One sentence that says whose figures these are."""
    facts = results["facts"]
    what = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    more = f", ISA level {facts['ISA']}" if "ISA" in facts and "gpu" not in facts else ""
    more += ", freed memory kept" if facts.get("freed memory") == "kept" else ""
    rates = results.get("rates")
    speed = ""
    if rates:
        single, half = (rates[f"{name}_flops_per_s"] for name in ("float32", "bfloat16"))
        # Of bfloat16 the larger of both was stored once.
        rounded = "and no more" if half == single else f"{half / 1e9:.0f}"
        speed = (
            f" In the same run it copied {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s (read and "
            f"write) and multiplied {single / 1e9:.0f} GFLOP/s in float32, {rounded} in bfloat16."
        )
    quick = " A quick run: few rounds." if results.get("quick") else ""
    return (
        f"Measured on {what}{more}; torch {facts['torch']}, Python {facts['python']}, commit "
        f"{facts['commit']}, {facts['date']}.{speed}{quick}{_again(results)}\n"
    )


def _again(results: Results) -> str:
    """Which rows are of a later run of their own."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, row in [*results.get("operations", {}).items(), *results.get("steps", {}).items()]:
        if "again" in row:
            found.setdefault((row["again"]["commit"], row["again"]["date"]), []).append(name)
    return "".join(
        f" Measured again, commit {commit}, {date}: {'; '.join(names)}."
        for (commit, date), names in found.items()
    )


def summary(results: Results) -> str:
    """The headline rows: forward and backward of whoever computes the same."""
    chosen = {name: results["operations"][name] for name in HEADLINES
              if name in results["operations"]}  # fmt: skip
    names = [n for n in SHOWN if any(n in row["competitors"] for row in chosen.values())]
    lines = []
    for title, row in chosen.items():
        found = [row["competitors"].get(name) for name in names]
        cells = [milliseconds(times["both"]["median"]) if times else "" for times in found]
        lines.append([title, *cells, milliseconds(row["floors"]["both"])])
    head = ["forward and backward, ms", *(f"`{name}`" for name in names), "floor"]
    return table(head, lines)


def operation(name: str) -> Callable[[Results], str]:
    """The renderer of all rows of one operation."""

    def render(results: Results) -> str:
        rows = {title: row for title, row in results["operations"].items()
                if row["operation"] == name}  # fmt: skip
        graphs = 2 * any(
            "graph" in times for row in rows.values() for times in row["competitors"].values()
        )
        lines = []
        for title, row in rows.items():
            fused = fused_of(row)
            best = row["competitors"][fused]["both"]["median"] if fused else None
            for who, times in sorted(
                row["competitors"].items(), key=lambda item: item[1]["both"]["median"]
            ):
                both = times["both"]
                ratio = f"{both['median'] / best:.2f}" if best and who != fused else ""
                lines.append([
                    title.removeprefix(f"{name} "),
                    who if times["same"] else f"{who} (another quantity)",
                    milliseconds(times["forward"]["median"]),
                    milliseconds(times["backward"]["median"]),
                    milliseconds(both["median"]),
                    f"{milliseconds(both['q1'])} - {milliseconds(both['q3'])}",
                    ratio,
                    _of_floor(row, times, both["median"]),
                    mebibytes(times["peak_bytes"]),
                    *([milliseconds(times["graph"]), _of_floor(row, times, times["graph"])]
                      if "graph" in times else [""] * graphs),
                ])  # fmt: skip
        if not lines:
            return NOT_YET
        similarity = name in ("representation", "kernel")
        return table(
            [f"{name} similarity" if similarity else name, "who", "forward ms",
             "backward ms", "both ms", "quartiles", "over fused", "of floor", "peak MiB",
             *["as a graph ms", "of floor"][:graphs]],
            lines,
        )  # fmt: skip

    return render


def step(results: Results) -> str:
    """All whole training steps."""
    head = ["training step", "objective", "ms", "quartiles", "images/s", "over plain",
            "peak MiB", "extra"]  # fmt: skip
    return table(head, _steps(results, results["steps"]))


def _steps(results: Results, titles: Iterable[str]) -> Iterator[list[str]]:
    for title in titles:
        found = results["steps"][title]
        for name, one in found["methods"].items():
            spent = one["seconds"]
            plain = name == found["base"]
            yield [
                title,
                name,
                milliseconds(spent["median"]),
                f"{milliseconds(spent['q1'])} - {milliseconds(spent['q3'])}",
                f"{one['images_per_second']:.0f}",
                "" if plain else _over_plain(one),
                mebibytes(one["peak_bytes"]),
                "" if plain else percent(one["extra_memory"]),
            ]


def _over_plain(method: Mapping) -> str:
    between = " to ".join(map(percent, method["overhead_quartiles"]))
    return f"{percent(method['overhead'])} ({between})"


def step_summary(results: Results) -> str:
    """The training steps in which the fused ways cost the least, of those of which the run can
    tell, and the most of all."""
    fused = {
        title: one
        for title, found in results["steps"].items()
        for name, one in found["methods"].items() if name.startswith(FUSED_WAYS)
    }  # fmt: skip
    if not fused:
        return "None in this run.\n"
    over = {title: one["overhead"] for title, one in fused.items()}
    told = [title for title, one in fused.items() if _spread(one) <= TELLING] or over
    least, most = min(told, key=over.__getitem__), max(over, key=over.__getitem__)
    lines = [
        [title, name, ms, images, overhead, more]
        for title, name, ms, _, images, overhead, _, more in _steps(
            results, dict.fromkeys((least, most))
        )
    ]
    head = [f"the least and the most of {len(over)} training steps", "objective", "ms",
            "images/s", "over plain", "more memory"]  # fmt: skip
    return table(head, lines)


def _spread(method: Mapping) -> float:
    """Between the quartiles of an overhead."""
    low, high = method["overhead_quartiles"]
    return high - low


def naive(results: Results) -> str:
    """One sentence about what the four ways cost as plainly written, and once compiled."""
    found = [
        f"{100 * one['overhead']:.0f} % longer ({title})"
        for title, step in results["steps"].items()
        for name, one in step["methods"].items() if name.startswith("four ways, naive")
    ]  # fmt: skip
    if not found:
        return "What they cost as plainly written was not measured in this run.\n"
    return f"Written plainly in PyTorch they make a training step {' or '.join(found)}.\n"


def step_kernels(results: Results) -> str:
    """How many layers way 4 took in the training steps."""
    said = "; ".join(f"{title}: {found['kernels']}" for title, found in results["steps"].items()
                     if found["methods"])  # fmt: skip
    return f"Layers whose kernels way 4 takes: {said}.\n"


def host(results: Results) -> str:
    """What a training step costs on the host."""
    if "host" not in results:
        return NOT_YET
    lines = []
    for name, one in results["host"].items():
        plain = one["both"]["ratio"] == 1
        cells = [milliseconds(one[what]["seconds"]["median"]) for what in ("forward", "both")]
        for what in ("forward", "both"):
            over = ("average", "fullest")
            cells += ["" if plain else f"{1e3 * one[what][k]:+.2f}" for k in over]
        lines.append([name, *cells, "" if plain else f"{one['both']['ratio']:.2f}"])
    head = ["training step on the host", "forward ms", "step ms", "forward over plain, average ms",
            "fullest", "step over plain, average ms", "fullest", "times plain"]  # fmt: skip
    return table(head, lines)


def contention(results: Results) -> str:
    """A training step beside a process that keeps a core busy."""
    if "contention" not in results:
        return NOT_YET
    lines = [
        [name, milliseconds(one["quiet"]["median"]), milliseconds(one["busy"]["median"]),
         f"{one['ratio']:.1f}",
         *("" if name == PLAIN else percent(one["over plain"][c]) for c in ("quiet", "busy"))]
        for name, one in results["contention"].items()
    ]  # fmt: skip
    head = ["training step", "quiet, ms", "beside a busy process, ms", "times quiet",
            "over plain, quiet", "busy"]  # fmt: skip
    return table(head, lines)


def freed(results: Results) -> str:
    """A training step with freed memory given back to the system, and kept."""
    if not results.get("allocator"):
        return NOT_YET
    lines = []
    for name, one in results["allocator"].items():
        given, kept = one[allocator.GIVEN_BACK], one[allocator.KEPT]
        saved = kept["seconds"]["median"] / given["seconds"]["median"] - 1
        cells = []
        for which in (given, kept):
            spent, faults = which["seconds"], which["faults"]
            between = f"{milliseconds(spent['q1'])} - {milliseconds(spent['q3'])}"
            cells += [f"{milliseconds(spent['median'])} ({between})", f"{faults['median']:,.0f}"]
        lines.append([name, *cells, percent(saved)])
    head = ["training step", "freed memory given back, ms", "page faults", "kept, ms",
            "page faults", "kept over given back"]  # fmt: skip
    return table(head, lines)


def reached(results: Results) -> str:
    """The project's targets that the run has measured."""
    found = list(targets.lines(results))
    return table(["target", "reach", "found", "met", "made of"], found) if found else NOT_YET


def scaling(results: Results) -> str:
    """Fitted exponents of the cost."""
    found = results["scaling"]
    names = list(dict.fromkeys(name for impls in found.values() for name in impls))
    lines = []
    for quantity, impls in found.items():
        points = next(iter(impls.values()))["points"]
        cells = [f"{impls[name]['slope']:.2f}" if name in impls else "" for name in names]
        lines.append([quantity, f"{points[0][0]} to {points[-1][0]}", *cells])
    return table(["exponent of the cost in", "from", *(f"`{name}`" for name in names)], lines)


def memory(results: Results) -> str:
    """Peak memory of kernel similarity over the number of kernels."""
    found = {name: dict(points) for name, points in results["memory"].items()}
    sizes = sorted({n for points in found.values() for n in points})
    lines = [
        [str(n), f"{4 * n * n / 2**20:.0f}",
         *(mebibytes(points[n]) if n in points else "not run" for points in found.values())]
        for n in sizes
    ]  # fmt: skip
    head = ["kernels N", "N x N float32, MiB", *(f"`{name}`, peak MiB" for name in found)]
    return table(head, lines)


def instructions(results: Results) -> str:
    """Instruction counts, or why there are none."""
    found = results["instructions"]
    if "reason" in found:
        return f"Not counted: {found['reason']}\n"
    lines = [[case, f"{count:,d}"] for case, count in found["instructions"].items()]
    return (
        f"Compiled by {found['compiler']} at level {found['isa']}, counted by "
        f"{found['valgrind']}.\n\n" + table(["kernel call", "instructions"], lines)
    )


def losing(results: Results) -> str:
    """Every row, pass and competitor of the same quantity that the fused kernels lose to."""
    lines = []
    for title, row in results["operations"].items():
        if not row["competitors"]:
            continue
        fused = fused_of(row)
        if fused is None:
            lines.append([title, "", "", "the fused kernels did not run", ""])
            continue
        mine = row["competitors"][fused]
        for what in ("forward", "backward", "both"):
            for who, times in row["competitors"].items():
                ratio = mine[what]["median"] / times[what]["median"]
                if who not in FUSED and times["same"] and ratio > 1:
                    lines.append([title, what, milliseconds(mine[what]["median"]),
                                  f"{who}: {milliseconds(times[what]['median'])}",
                                  f"{ratio:.2f}"])  # fmt: skip
    if not lines:
        return "None in this run.\n"
    return table(["row", "pass", "fused ms", "faster, ms", "times slower"], lines)


def below_floor(results: Results) -> str:
    """Every row and pass of what computes the same in less than the floor."""
    lines = [
        [title, what, who, milliseconds(times[what]["median"]),
         milliseconds(row["floors"][what]), f"{row['floors'][what] / times[what]['median']:.0%}"]
        for title, row in results["operations"].items()
        for what in row["floors"]
        for who, times in row["competitors"].items()
        if times["same"] and times[what]["median"] < row["floors"][what]
    ]  # fmt: skip
    if not lines:
        return "None in this run.\n"
    return table(["row", "pass", "who", "ms", "floor, ms", "of floor"], lines)


def left_out(results: Results) -> str:
    """Who was not timed, and why; the same reason for many rows is told once."""
    rows_of: dict[tuple[str, str], list[str]] = {}
    for group in ("operations", "steps"):
        for title, row in results[group].items():
            for who, reason in row["left_out"].items():
                rows_of.setdefault((who, reason), []).append(title)
    lines = []
    for (who, reason), rows in rows_of.items():
        many = f"{len(rows)} rows" if len(rows) > 3 else "; ".join(rows)
        lines.append([who, many, reason.replace("|", "\\|")])
    return table(["who", "where", "why"], lines) if lines else "Nobody.\n"


def fused_of(row: Mapping) -> str | None:
    """The fastest of the fused kernels that ran."""
    ran = [name for name in FUSED if name in row["competitors"]]
    return min(ran, key=lambda n: row["competitors"][n]["both"]["median"], default=None)


def _of_floor(row: Mapping, times: Mapping, seconds: float) -> str:
    floor = row["floors"].get("both")
    return f"{floor / seconds:.0%}" if floor is not None and times["same"] else ""


TABLES: dict[str, Callable[[Results], str]] = {
    "machine": machine,
    "summary": summary,
    **{name: operation(name) for name in OPERATIONS},
    "step": step,
    "step-summary": step_summary,
    "step-kernels": step_kernels,
    "naive": naive,
    "host": host,
    "contention": contention,
    "freed": freed,
    "targets": reached,
    "scaling": scaling,
    "memory": memory,
    "instructions": instructions,
    "losing": losing,
    "below-floor": below_floor,
    "left-out": left_out,
}


# What is shown of bfloat16, and of a machine that measured it where this one has no units for it.
OF_BFLOAT16 = ("machine", *OPERATIONS, "step", "targets")


def bfloat16(results: Results) -> dict[str, Any]:
    """The rows and steps of bfloat16 that some results have, with whose they are."""
    return {
        **results,
        "operations": {title: row for title, row in results["operations"].items()
                       if "bfloat16" in title and row["competitors"]},
        "steps": {title: found for title, found in results["steps"].items()
                  if "bfloat16" in title and found["methods"]},
    }  # fmt: skip


def fill_bfloat16(path: Path, everything: Iterable[Results]) -> list[str]:
    """Put the newest of these results that have rows of bfloat16 into a document's places
    ``<!-- bfloat16:NAME -->``; the names of those."""
    having = [found for found in map(bfloat16, everything) if found["operations"]]
    newest = max(having, key=lambda found: found["facts"]["date"], default=None)
    return fill_places(path, "bfloat16", {
        name: partial(TABLES[name], newest) if newest else lambda: NOT_YET
        for name in OF_BFLOAT16
    })  # fmt: skip


def fill_machines(path: Path, everything: Iterable[Results]) -> list[str]:
    """Put the targets of all these results, side by side, into a document's place
    ``<!-- machines:targets -->``; the names of the places."""
    return fill_places(path, "machines", {"targets": partial(_side_by_side, list(everything))})


def _side_by_side(everything: Sequence[Results]) -> str:
    """What each machine found of each target, the newest first; in bold what it missed."""
    newest = sorted(everything, key=lambda results: results["facts"]["date"], reverse=True)
    head, found = ["target", "reach"], []
    for results in newest:
        facts = results["facts"]
        head.append(f"{facts['cpu']}, {facts['date']}, {facts['commit']}")
        lines = targets.lines(results)
        found.append({what: value if met == "yes" else f"**{value}**"
                      for what, _, value, met, _ in lines})  # fmt: skip
    return table(head, (
        [target.what, target.reach, *(of.get(target.what, "") for of in found)]
        for target in targets.TARGETS
    ))  # fmt: skip


def text(results: Results, names: Iterable[str] = TABLES) -> str:
    """The tables named, each under its name."""
    return "".join(f"\n{name}\n\n{TABLES[name](results)}" for name in names)
