"""Results for people: a few lines a data set."""

from collections.abc import Mapping
from typing import Any

# Beyond so many phenomena only the best and the worst are shown.
PHENOMENA_SHOWN = 12


def write_table(table: Mapping[str, Any]) -> str:
    """Write the results of an evaluation as text."""
    parts = [data_set_lines(result) for result in table["results"]]
    if "stories" in table:
        parts.append(story_lines(table["stories"]))
    return "\n\n".join("\n".join(lines) for lines in parts)


def data_set_lines(result: Mapping[str, Any]) -> list[str]:
    """Write one data set: what it is, its numbers, its speed."""
    kinds = {"corpus": document_lines, "conversations": document_lines}
    kinds |= {"choices": choice_lines, "pairs": pair_lines}
    speed = f"{result['seconds']:.1f} s, {result['tokens_per_second']:,.0f} tokens/s"
    lines = [*kinds[result["kind"]](result), f"  {speed}"]
    left_out = [f"{result[name]} {name.replace('_', ' ')}" for name in ("bad_records", "too_short")
                if result[name]]  # fmt: skip
    return [*lines, f"  left out: {', '.join(left_out)}"] if left_out else lines


def document_lines(result: Mapping[str, Any]) -> list[str]:
    """Write the losses of documents or conversations."""
    what = (
        f"{result['documents']:,} {'documents' if result['kind'] == 'corpus' else result['kind']}"
    )
    windows = result["documents_in_windows"]
    cut = f", {windows:,} of them in several windows" if windows else ""
    lines = [
        f"{result['name']} ({result['kind']}): {what}{cut}, {result['tokens']:,} tokens scored, "
        f"{result['bytes']:,} bytes",
        line(result, "loss", "nats per token"),
        line(result, "perplexity", ""),
        line(result, "bits_per_byte", ""),
    ]
    if "bits_per_byte_without_end" in result:
        lines.append(line(result, "bits_per_byte_without_end", "the end of documents not counted"))
    if "entropy_floor_bits_per_byte" in result:
        floor = result["entropy_floor_bits_per_byte"]
        above = result["bits_per_byte"] / floor - 1
        lines.append(f"  {'entropy floor':<26}{floor:>10.4f}  no model does better ({above:+.1%})")
    return lines


def choice_lines(result: Mapping[str, Any]) -> list[str]:
    """Write the accuracies of questions."""
    cut = result["questions_cut"]
    how = f", {cut:,} cut to the context" if cut else ""
    chance = f"by chance {result['chance']:.4f}"
    return [
        f"{result['name']} (choices): {result['questions']:,} questions{how}{ties(result)}",
        line(result, "acc", chance),
        line(result, "acc_norm", "likelihood per character"),
        line(result, "acc_bytes", "likelihood per byte"),
    ]


def pair_lines(result: Mapping[str, Any]) -> list[str]:
    """Write the accuracies of pairs, in all and by phenomenon."""
    lines = [
        f"{result['name']} (pairs): {result['pairs']:,} pairs{ties(result)}",
        line(result, "acc", f"by chance {result['chance']:.4f}"),
    ]
    ranked = sorted(result["phenomena"].items(), key=lambda item: -item[1]["acc"])
    shown = [line({name: row["acc"], f"{name}_stderr": row["acc_stderr"]}, name, "", width=46)
             for name, row in ranked]  # fmt: skip
    if len(shown) > PHENOMENA_SHOWN:
        half = PHENOMENA_SHOWN // 2
        more = len(shown) - 2 * half
        shown[half:-half] = [f"    ... {more} more; all are in the file that --out names"]
    return [*lines, *shown]


def story_lines(result: Mapping[str, Any]) -> list[str]:
    """Write what was measured on stories that the model wrote."""
    lines = [f"{result['stories']:,} stories that the model wrote"]
    notes = {
        "words": "a story, without the prompt",
        "ended_share": "ended by the model itself",
        "distinct_1": "different words, by all words",
        "self_repetition": "runs of four words said before in the same story",
        "grammatical_sentences": "that the grammar of the built-in stories can make",
    }
    for name in result:
        if name != "stories" and not name.endswith("_stderr"):
            lines.append(line(result, name, notes.get(name, "")))
    return lines


def line(result: Mapping[str, Any], name: str, note: str, *, width: int = 26) -> str:
    """Write one number with its standard error."""
    stderr = result.get(f"{name}_stderr")
    indent = "  " if width == 26 else "    "
    error = f" ± {stderr:.4f}" if stderr is not None else " " * 9
    text = f"{indent}{name.replace('_', ' ') if width == 26 else name:<{width}}"
    return f"{text}{result[name]:>10.4f}{error}  {note}".rstrip()


def ties(result: Mapping[str, Any]) -> str:
    """Say how many could not be told apart, if any."""
    return f", {result['ties']:,} ties" if result["ties"] else ""
