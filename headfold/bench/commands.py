"""The commands of `headfold`: bench, plan, check, tune and compile. They import torch inside, so that --help is quick."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from headfold.bench.report import console
from headfold.bench.results import Result

if TYPE_CHECKING:
    from headfold.bench.shapes import Answer

T = TypeVar("T")
EXIT_FAILED = 1
EXIT_USAGE = 2

app = typer.Typer(
    name="headfold",
    help="Attention for grouped-query models: measure it, ask how a shape will run, test this machine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def stop(message: str) -> NoReturn:
    """End with one line on stderr and the exit code of a wrong call."""
    console(stderr=True).print(f"[bold red]headfold:[/] {escape(message)}", soft_wrap=True)
    raise typer.Exit(EXIT_USAGE)


def _version(value: bool) -> None:
    if value:
        import headfold

        typer.echo(f"headfold {headfold.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Attention for grouped-query models: measure it, ask how a shape will run, test this machine."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="decode (every kind of it), paged, ragged, prefill, features (each beside its plain case), "
            "all or quick."
        ),
    ] = "all",
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name matches this glob; may be repeated.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Also measure this peer; may be repeated or comma-separated: cudnn, flash, fa3, fa4, flashinfer, "
            "sdpa-folded, math, or the path of a .so with FlashAttention-3's operators."
        ),
    ] = None,
    fa3_library: Annotated[
        Path | None,
        typer.Option(
            help="Where fa3 is: a .so with FlashAttention-3's operators, instead of the flash_attn_interface "
            "package. Or name it in the environment as HEADFOLD_FA3_LIBRARY."
        ),
    ] = None,
    no_torch: Annotated[bool, typer.Option("--no-torch", help="Leave out PyTorch's own ways.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32, instead of each case's own.")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of every case, instead of what suits the device.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the result here, after every case.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the result here, as .svg or .png.")] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", help="Show and draw this earlier result; measure nothing.")
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Show the planner's predicted times beside the measured ones.")
    ] = False,
    list_cases: Annotated[
        bool, typer.Option("--list", help="List the cases and the peers, and end.")
    ] = False,
) -> None:
    """Measure headfold against this machine's limits, PyTorch and other libraries.

    Every output is compared with a float64 reference before it is timed. Implementations of a case are
    timed in turn, in one process. GB/s counts K and V once; TFLOP/s counts visible pairs only. Exits with 1
    if headfold itself failed somewhere.
    """
    from headfold.bench import report

    out = console()
    if picture is not None:
        _usage(lambda: _check_picture(picture))
    if from_file is not None:
        result = _usage(lambda: Result.load(from_file).only(case or ()))
        report.show(result, out)
        _predict(result, predict, out)
        _draw(result, picture, out)
        return
    from headfold.bench import session

    names = tuple(name for text in against or () for name in text.split(",") if name)
    options = session.Options(
        device=device or session.default_device(),
        suite=suite,
        names=tuple(case or ()),
        against=names,
        with_torch=not no_torch,
        dtype=dtype,
        rounds=rounds,
        fa3_library=None if fa3_library is None else str(fa3_library),
    )
    if predict and options.device != "cuda":
        stop("--predict needs a GPU: a CPU's rates are not known")
    cases = _usage(lambda: session.cases_of(options))
    if list_cases:
        report.show_cases(cases, session.peers_of(options), out)
        return
    with report.Progress(len(cases)) as progress:
        result = _usage(lambda: session.run(options, cases, json_file, progress.say, progress.advance))
    report.show(result, out)
    _predict(result, predict, out)
    _draw(result, picture, out)
    if result.own_failures():
        raise typer.Exit(EXIT_FAILED)


def _usage(run: Callable[[], T]) -> T:
    """Run something that raises on a wrong option or file, and end in one line where it does."""
    try:
        return run()
    except OSError as e:
        stop(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    except ValueError as e:
        stop(str(e))


def _check_picture(path: Path) -> None:
    from headfold.bench.pictures import check_format

    check_format(path)
    _need_matplotlib()


def _need_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise ValueError("--picture needs matplotlib; install it with: pip install 'headfold[cli]'")


def _predict(result: Result, asked: bool, out: Console) -> None:
    if not asked:
        return
    from headfold.bench.predict import predictions
    from headfold.bench.report import show_predictions

    show_predictions(_usage(lambda: predictions(result)), out)


def _draw(result: Result, path: Path | None, out: Console) -> None:
    if path is None:
        return
    from headfold.bench.pictures import draw

    _usage(lambda: draw(result, path))
    out.print(f"picture: {escape(str(path))}")


@app.command()
def plan(
    heads: Annotated[str | None, typer.Option(help="Query heads : KV heads, such as 96:8.")] = None,
    dim: Annotated[int, typer.Option(help="Head dimension of queries and keys.")] = 128,
    dim_v: Annotated[int | None, typer.Option(help="Head dimension of values, if another.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    keys: Annotated[int, typer.Option(help="Keys of the longest sequence.")] = 8192,
    queries: Annotated[int, typer.Option(help="Queries of a sequence.")] = 1,
    causal: Annotated[bool, typer.Option("--causal", help="Causal, aligned bottom-right.")] = False,
    window: Annotated[str | None, typer.Option(help="LEFT,RIGHT; -1 is open.")] = None,
    page_size: Annotated[int, typer.Option(help="Keys of a page; 0 is not paged.")] = 0,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    num_splits: Annotated[int, typer.Option(help="Splits to force; 0 lets the planner decide.")] = 0,
    no_pack: Annotated[bool, typer.Option("--no-pack", help="Do not fold the heads of a group.")] = False,
    case: Annotated[str | None, typer.Option(help="A case of the benchmark instead of a shape.")] = None,
    device: Annotated[
        str | None, typer.Option(help="The machine to plan for, such as h200; the GPU here, or else h200.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw which program reads which keys, when, as .png, .svg or .html (decode only)."),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="With --picture: keys of every sequence, such as 4096,128,77; all --keys otherwise."
        ),
    ] = None,
) -> None:
    """Explain how a shape will run, and why. Needs no GPU."""
    from headfold.bench import shapes

    if picture is not None:
        _usage(lambda: _check_plan_picture(picture))
    elif lengths is not None:
        stop("--lengths is given without --picture; it says what the picture shows")
    target = _usage(lambda: shapes.device_from(device))
    chosen = None if case is None else _usage(lambda: shapes.case_named(case, target))
    if chosen is not None:
        problem = chosen.problem("cpu" if target.is_cpu else "cuda")
    elif heads is not None:
        shape = shapes.Shape(
            heads, dim, batch, keys, queries, dim_v, causal, window, page_size, dtype, num_splits, not no_pack
        )
        problem = _usage(lambda: shapes.problem_from(shape, target))
    else:
        stop("--heads is missing; give a shape such as --heads 96:8 --keys 65536, or --case NAME")
    answer = _usage(lambda: shapes.explain(problem, target))
    if picture is not None:
        _usage(lambda: _draw_plan(answer, shapes.lengths_from(lengths, problem, chosen), picture))
    if as_json:
        typer.echo(json.dumps(answer.record(), indent=1))
        return
    headline, *lines = answer.text.splitlines()
    lines.append(f"  {answer.predicted_text}")
    body = Text("\n").join([Text(headline, style="bold"), *map(Text, lines)])
    console().print(Panel(body, title=f"plan for {escape(target.name)}", title_align="left", expand=False))
    if picture is not None:
        console().print(f"picture: {escape(str(picture))}")


def _check_plan_picture(path: Path) -> None:
    from headfold.bench.plan_picture import check_format

    check_format(path)
    _need_matplotlib()


def _draw_plan(answer: Answer, lengths: tuple[int, ...], path: Path) -> None:
    from headfold.bench.plan_picture import draw
    from headfold.bench.schedule import schedule_of

    schedule = schedule_of(answer.problem, answer.plan, answer.device, lengths)
    draw(schedule, f"{answer.text.splitlines()[0]} on {answer.device.name}", path)


@app.command()
def check() -> None:
    """Test this machine: versions, the GPU, and a small run on every backend that can run here.

    Exits with 1 if something that is needed here is missing or wrong.
    """
    from headfold.bench.selfcheck import findings

    out = console()
    marks = {
        "ok": "[green]ok[/]",
        "missing": "[yellow]missing[/]",
        "failed": "[red]failed[/]",
        "note": "[blue]note[/]",
    }
    bad = []
    for f in findings():
        mend = f"  ({f.mend})" if f.mend else ""
        out.print(
            f"{marks[f.state]}{' ' * (8 - len(f.state))}{f.what:24}{escape(f.found + mend)}", soft_wrap=True
        )
        if f.is_bad:
            bad.append(f.what)
    if bad:
        out.print(f"[bold red]{len(bad)} problem{'s' if len(bad) > 1 else ''}:[/] {escape(', '.join(bad))}")
        raise typer.Exit(EXIT_FAILED)
    out.print("[bold green]Everything that is needed here works.[/]")


@app.command()
def tune(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only tiles of this form: wave, waves, few, stream or pages; may be repeated."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what is measured already.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show the table; measure nothing.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="The table's file, instead of the one in the cache directory that headfold reads."),
    ] = None,
) -> None:
    """Measure this machine's own decode tiles, beside the built-in ones.

    Nothing needs it: the built-in tiles are right everywhere. The table is written to $HEADFOLD_CACHE_DIR, else to the
    user's cache directory, after each tile: an interrupted run goes on where it stopped. Processes that start later
    use it; with HEADFOLD_TUNED=0 they do not.
    """
    from headfold.bench import report
    from headfold.bench import tune as tuning
    from headfold.bench.runner import DeviceLost

    out = console()
    if show:
        in_force = _usage(lambda: tuning.table_to_show(output))
        if in_force is None:
            out.print("no table is in force: decode runs in the built-in tiles")
        else:
            report.show_tiles(in_force, out)
        return
    work = _usage(lambda: tuning.work_here(tuple(only or ()), again, output))
    with report.Progress(len(work.goals)) as progress:
        try:
            table, problems = _usage(lambda: tuning.run(work, progress.say, progress.advance))
        except DeviceLost as e:
            stop(f"the GPU was lost in {e}; what was measured before is kept")
    report.show_tiles(table, out)
    out.print(f"table: {escape(str(work.path))}", soft_wrap=True)
    if problems:
        out.print("[bold red]not measured:[/] " + escape("; ".join(problems)), soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)


@app.command(name="compile")
def compile_ahead(
    config: Annotated[Path, typer.Option(help="The model's config.json.")],
    cache: Annotated[
        Path, typer.Option(help="Folder for the kernels; ship it and set TRITON_CACHE_DIR to it.")
    ],
    arch: Annotated[str, typer.Option(help="The GPU's architecture, such as sm_90.")] = "sm_90",
) -> None:
    """Compile a model's kernels ahead of time, without a GPU.

    A process with the same headfold, Triton and Python that finds the folder in TRITON_CACHE_DIR compiles nothing.
    """
    from headfold import precompile

    model = _usage(lambda: precompile.read_model(config))
    out = console()
    with out.status("compiling") as status:
        try:
            kernels = _usage(
                lambda: precompile.precompile(model, arch, cache, lambda name: status.update(name))
            )
        except RuntimeError as e:
            stop(str(e))
    out.print(f"{kernels} kernels for {escape(arch)} in {escape(str(cache))}", soft_wrap=True)
    out.print(f"set TRITON_CACHE_DIR={escape(str(cache.absolute()))} where they run", soft_wrap=True)
