"""The entry point of the `headfold` command."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line. Without its extra, say in one sentence how to install it."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        _stop(
            f"the command line needs {' and '.join(missing)}, which {verb} not installed: "
            "pip install 'headfold[cli]'"
        )
    import typer

    from headfold.bench.commands import app

    usage_error: Any = typer.BadParameter.__bases__[0]  # typer carries click under different names
    try:
        code = app(standalone_mode=False)
    except usage_error as e:
        _stop(e.format_message())
    except typer.Abort:
        raise SystemExit(130) from None
    raise SystemExit(code)


def _stop(message: str) -> NoReturn:
    print(f"headfold: {message}", file=sys.stderr)
    raise SystemExit(2)
