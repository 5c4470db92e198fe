"""The command line `orthogon`. Starts in a blink: torch is loaded only by the processes that need it."""

from __future__ import annotations

import sys
from typing import Any

from launch.verbs import VERBS, find
from trainer.outcome import Outcome, RunError

INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


def main() -> None:
    """Entry point of the command line."""
    try:
        sys.exit(dispatch(sys.argv[1:]))
    except RunError as error:
        print(error, file=sys.stderr)
        sys.exit(error.outcome.code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader has seen enough: `orthogon diff a b | head`
        sys.stderr.close()
        sys.exit(0)


def dispatch(arguments: list[str]) -> int:
    """Parse and run one command line; returns the exit code.

    Raises:
        RunError: there is no such verb, or it does not understand an option.
    """
    name = " ".join(arguments[:2]) if " ".join(arguments[:2]) in VERBS else " ".join(arguments[:1])
    if name not in VERBS:
        return overview(arguments)
    given = arguments[len(name.split()) :]
    verb, rest = _parse(name, given)
    if rest and not type(verb).OVERRIDES:
        raise RunError(f"'{rest[0]}' is not understood", where="command line", mend=f"see orthogon {name} --help")
    sys.stdout.flush()
    return int(verb(rest))


def overview(arguments: list[str]) -> int:
    """The list of verbs, or of those of a family (`orthogon checkpoint`).

    Raises:
        RunError: the first word is no verb.
    """
    words = [word for word in arguments[:2] if not word.startswith("-")]
    families = {name.split()[0] for name in VERBS if " " in name}
    family = words[0] if words and words[0] in families else None
    shown = [name for name in VERBS if family is None or name.split()[0] == family]
    if words and (family is None or len(words) > 1):
        from trainer.yaml_source import nearest

        given = " ".join(words) if family else words[0]
        guess = nearest(given, [*shown, *families])
        mend = f"did you mean {guess}?" if guess else f"verbs: {', '.join(shown)}"
        raise RunError(f"there is no verb '{given}'", where="command line", mend=mend)
    print(f"usage: orthogon {family or 'VERB'} ...\n" + ("" if family else "\nPretrain language models.\n"))
    width = max(len(name) for name in shown) + 2
    for name in shown:
        print(f"  {name:{width}}{find(name).__doc__.splitlines()[0]}")
    print("\northogon VERB --help tells the options of a verb.")
    return 0


def _parse(name: str, arguments: list[str]) -> tuple[Any, list[str]]:
    quick = getattr(find(name), "quick", None)
    verb = quick(arguments) if quick is not None else None
    if verb is not None:
        return verb, []
    import tyro

    try:
        return tyro.cli(
            find(name), prog=f"orthogon {name}", args=arguments, return_unknown_args=True,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
        )  # fmt: skip
    except SystemExit as end:  # tyro has said what is wrong
        sys.exit(Outcome.BAD_CONFIGURATION.code if end.code else 0)


if __name__ == "__main__":
    main()
