"""One picture of the run as lines of text, made to fit a terminal of `width` x `height`; pure, so that a test can read it.

Header and progress come first and go last; what a small terminal cannot hold is left out by priority, never wrapped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from hone.launch.observe.metrics import is_healthy
from hone.launch.observe.progress import FAILED, READY, RunInfo, Start, View
from hone.launch.observe.text import bar, duration, encodable, inert, number, sparkline

PHASES = ("generation", "make_experience", "ppo_train", "broadcast", "label", "train", "evaluate")
_LABEL = 11
_LARGEST_GAP = "largest gap of the run"
# Rows of figures: what goes last on a small terminal has the highest number; then the label, and (name, metric, unit) of each figure.
_ROWS = (
    (
        70,
        "gap",
        (
            ("mean", "mismatch/logp_abs_diff_mean", "nats"),
            ("worst step", _LARGEST_GAP, ""),
            ("one token", "mismatch/logp_abs_diff_max", ""),
        ),
    ),
    (60, "policy", (("KL", "train/kl", "nats"), ("entropy", "train/entropy", "nats"), ("clipped", "train/ppo_clip_ratio", "%"))),
    (50, "loss", (("policy", "train/policy_loss", ""), ("critic", "train/critic_loss", ""), ("gradient", "train/actor_grad_norm", ""))),
    (68, "held out", (("loss", "eval/loss", ""), ("accuracy", "eval/accuracy", "%"), ("margin", "eval/reward_margin", ""))),
    (66, "step", (("loss", "train/loss", ""), ("accuracy", "train/accuracy", "%"), ("margin", "train/reward_margin", ""))),
    (50, "learning", (("gradient", "train/grad_norm", ""), ("rate", "train/lr", ""), ("epoch", "train/epoch", ""))),
    (55, "response", (("length", "rollout/response_length_mean", "tokens"), ("truncated", "rollout/truncated_rate", "%"))),
    (45, "speed", (("sampling", "perf/rollout_tokens_per_second", "tok/s"), ("learning", "perf/train_tokens_per_second", "tok/s"))),
    (35, "memory", (("peak", "perf/peak_memory_gb", "GB"), ("sync", "perf/sync_ms", "ms"))),
)
_SPINNER = ("\u280b", "\u2819", "\u2838", "\u2834", "\u2826", "\u2807")
_ASCII_SPINNER = ("|", "/", "-", "\\")
_PHASE_STYLES = dict(zip(PHASES, ("cyan", "blue", "magenta", "yellow", "blue", "magenta", "cyan"), strict=True))


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Where the picture goes: characters across and down, and the encoding that must hold every one of them."""

    width: int
    height: int
    encoding: str

    @property
    def ascii_only(self) -> bool:
        """Whether block characters and arrows must be replaced."""
        return not self.encoding.lower().replace("-", "").startswith("utf")

    def foreign(self, text: str) -> str:
        """Text written by others, safe to show here."""
        return encodable(inert(text), self.encoding)


@dataclass(frozen=True, kw_only=True)
class Block:
    """Lines that are shown together or not at all; the lowest `priority` is left out first."""

    priority: int
    lines: Sequence[Text]


def frame(info: RunInfo, view: View, canvas: Canvas) -> list[Text]:
    """The lines to draw: never more than the canvas is high, never wider than it is wide."""
    blocks = _header(info, canvas)
    blocks += _training(info, view, canvas) if view.step else _starting(view, canvas)
    room = max(canvas.height - 1, 1)  # the cursor stands on a line of its own
    while sum(len(block.lines) for block in blocks) > room and len(blocks) > 1:
        blocks.remove(min(blocks, key=lambda block: block.priority))
    lines = [line for block in blocks for line in block.lines][:room]
    for line in lines:
        line.no_wrap = True
        line.truncate(canvas.width, overflow="crop" if canvas.ascii_only else "ellipsis")
    return lines


def reward_line(rewards: Sequence[float], width: int, *, ascii_only: bool) -> Text:
    """First and last reward, and the curve of all steps between them."""
    arrow = "->" if ascii_only else "\u2192"
    figures = f"{number(rewards[0])} {arrow} {number(rewards[-1])}"
    curve = sparkline(rewards, max(width - len(figures) - 2, 0), ascii_only=ascii_only)
    return Text.assemble((figures, "bold green"), "  ", (curve, "green"))


def _header(info: RunInfo, canvas: Canvas) -> list[Block]:
    rule = "-" if canvas.ascii_only else "\u2500"
    title = Text.assemble((f"{rule * 2} ", "dim"), ("hone ", "bold"), (canvas.foreign(info.verb), "bold cyan"), " ")
    title.append(rule * max(canvas.width - title.cell_len, 0), "dim")
    about = [_row("model", Text(canvas.foreign(info.model))), _row("data", Text(canvas.foreign(info.data)))]
    return [
        Block(priority=90, lines=[title]),
        Block(priority=25, lines=about),
        Block(priority=40, lines=[_row("run", Text(canvas.foreign(info.directory)))]),
    ]


def _starting(view: View, canvas: Canvas) -> list[Block]:
    """Before the first step is done: what is being started, and for how long already."""
    marks = _ASCII_SPINNER if canvas.ascii_only else _SPINNER
    spinner = marks[int(view.elapsed_s * 4) % len(marks)]
    widest = max((len(canvas.foreign(start.role)) for start in view.starts), default=0)
    rows = [_start_row(start, spinner, widest, canvas) for start in view.starts]
    blocks = [Block(priority=10, lines=[Text()]), Block(priority=80, lines=rows)]
    if view.running:
        first = Text.assemble(
            (f" {spinner} ", "cyan"), ("step 1", "bold"), f"  {canvas.foreign(view.running.name)} {duration(view.running.elapsed_s)}"
        )
        blocks += [Block(priority=10, lines=[Text()]), Block(priority=85, lines=[first])]
    waiting = [Text(f"   {duration(view.elapsed_s)} since the start", "dim")]
    return [*blocks, Block(priority=10, lines=[Text()]), Block(priority=20, lines=waiting)]


def _start_row(start: Start, spinner: str, widest: int, canvas: Canvas) -> Text:
    done, cross = ("ok", "!!") if canvas.ascii_only else ("\u2713", "\u2717")
    mark, style = {READY: (done, "green"), FAILED: (cross, "bold red")}.get(start.state, (spinner, "cyan"))
    role = canvas.foreign(start.role)
    taken = f"{duration(start.elapsed_s):>7}"
    return Text.assemble((f" {mark:<2}", style), f"{role:<{widest}}  ", (taken, "dim"), "  ", canvas.foreign(start.state))


def _training(info: RunInfo, view: View, canvas: Canvas) -> list[Block]:
    """From the first step on: where it stands, how it goes, what it costs."""
    room = canvas.width - _LABEL - 2
    metrics = view.metrics if view.largest_gap is None else {**view.metrics, _LARGEST_GAP: view.largest_gap}
    blocks = [
        Block(priority=5, lines=[Text()]),
        Block(priority=85, lines=_progress(info, view, canvas)),
        Block(priority=10, lines=[Text()]),
    ]
    if view.rewards:
        blocks.append(Block(priority=80, lines=[_row(view.headline, reward_line(view.rewards, room, ascii_only=canvas.ascii_only))]))
    for priority, label, figures in _ROWS:
        if shown := _figures(figures, metrics, room):
            blocks.append(Block(priority=priority, lines=[_row(label, shown)]))
    total = metrics.get("timing/step_total")
    if total:
        blocks += [Block(priority=10, lines=[Text()]), Block(priority=30, lines=_phases(view, float(total), canvas))]
    return blocks


def _progress(info: RunInfo, view: View, canvas: Canvas) -> list[Text]:
    share = view.step / info.total_steps if info.total_steps else 0.0
    eta = "" if view.eta_s is None or view.step >= info.total_steps else f"   {duration(view.eta_s)} left"
    text = Text.assemble((f"{view.step}/{info.total_steps}", "bold"), f"   {duration(view.elapsed_s)} so far{eta}")
    full, empty = bar(share, max(canvas.width - _LABEL - 5 - text.cell_len, 0), ascii_only=canvas.ascii_only)
    if canvas.width >= 50:
        text = Text.assemble((full, "green"), (empty, "dim"), "   ", text)
    return [_row("step", text)]


def _figures(figures: Sequence[tuple[str, str, str]], metrics: Mapping[str, int | float], room: int) -> Text:
    """`label value unit` for those the last step has and the line has room for; outside its healthy range in red with a mark."""
    shown = Text()
    for label, name, unit in figures:
        if (value := metrics.get(name)) is None:
            continue
        healthy = is_healthy(name, value)
        mark = "" if healthy else " !"
        figure = f"{value * 100:.1f} %" if unit == "%" else f"{number(value)} {unit}".strip()
        one = Text.assemble("   " if shown else "", (f"{label} ", "dim"), (figure, "" if healthy else "bold red"), (mark, "bold red"))
        if shown.cell_len + one.cell_len <= room:
            shown.append_text(one)
    return shown


def _phases(view: View, total_s: float, canvas: Canvas) -> list[Text]:
    """A bar a phase: its share of the last step's time. The phase in progress is marked, with its time so far."""
    name_width = max(len(name) for name in PHASES)
    pointer = ">" if canvas.ascii_only else "\u25b8"
    room = min(max(canvas.width - name_width - 34, 0), 60)
    lines = []
    for name in PHASES:
        if (seconds := view.metrics.get(f"timing/{name}")) is None:
            continue
        full, _ = bar(float(seconds) / total_s, room, ascii_only=canvas.ascii_only)
        running = view.running if view.running and view.running.name == name else None
        line = Text.assemble((f" {pointer} " if running else "   ", "bold cyan"), f"{name:<{name_width}}  ")
        line.append(f"{100 * float(seconds) / total_s:3.0f} %  {duration(float(seconds)):>7}  ", "dim")
        line.append(f"{full:<{room}}", _PHASE_STYLES[name]).append(f" {duration(running.elapsed_s)}" if running else "", "cyan")
        lines.append(line)
    return lines


def _row(label: str, content: Text) -> Text:
    return Text.assemble(" ", (f"{label:<{_LABEL}}", "dim"), " ", content)
