"""Options made from the fields of a config, so that a setting is documented in one place.

    def train(
        given: Annotated[Given, FromConfig("train.config.TrainConfig", only=("store", "top_k"))],
        as_json: Json = False,
    ) -> None:

An option has its field's name, type and default, and its help is the first sentence of the
docstring under the field. A field that is None unless given shows as its default what follows
"None takes" in that docstring. `given` has the settings that were typed, by name. A parameter of
the command with the name of a field takes its place; the others come after the fields.

Nothing of it is done, and no config is imported, before a command runs or shows its help.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand

from .completing import COMPLETED
from .panels import footer, panel_of_command, panel_of_option

Given = dict[str, Any]
"""Settings that were typed, by the name of the field."""
_SENTENCE = re.compile(r".+?\.(?=\s|$)")
_DEFAULT = re.compile(r"None takes (.+?)\.(?=\s|$)")


@dataclass(frozen=True, slots=True)
class FromConfig:
    """Which options of a command are fields of a config."""

    config: str
    """Config as module.Class within the package."""
    only: tuple[str, ...] = ()
    """Fields that are options, the others being for TOML files; none named takes all."""
    arguments: tuple[str, ...] = ()
    """Fields that are arguments."""
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of options that are not their fields'."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Fields that the command fills in where they are not given, and what is shown as the value."""
    many: bool = False
    """Whether an option is a text with several values, joined by commas."""

    def load(self) -> type[Any]:
        """Import the config."""
        module, _, name = self.config.rpartition(".")
        kind: type[Any] = getattr(import_module(f"..{module}", __package__), name)
        return kind


def add_command(
    app: typer.Typer, name: str, command: Callable[..., None], *, of: str | None = None
) -> None:
    """Add a command to an app; its options are made when it runs or shows its help.

    Args:
        app: to which it is added.
        name: as it is typed.
        command: function with its options.
        of: command to which this one belongs.
    """

    class Command(TyperCommand):
        is_made = False

        def get_params(self, ctx: Any) -> Any:
            if not self.is_made:
                made = _with_options(command)
                self.params, self.callback, self.is_made = made.params, made.callback, True
                for param in made.params:
                    self.in_panel(param)
            return super().get_params(ctx)

        def get_help_option(self, ctx: Any) -> Any:
            return self.in_panel(super().get_help_option(ctx))

        def in_panel(self, param: Any) -> Any:
            if param is not None:
                param.rich_help_panel = panel_of_option(name, param.name or "help")
            return param

    app.command(
        name,
        cls=Command,
        help=_flowing(inspect.getdoc(command) or ""),
        epilog=footer(of or name),
        rich_help_panel=None if of else panel_of_command(name),
    )(lambda: None)


def _flowing(text: str) -> str:
    """Return a docstring whose paragraphs are a line each, for help of any width."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def field_docs(config: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a config, in one line, from its source."""
    tree = ast.parse(inspect.getsource(sys.modules[config.__module__]))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == config.__name__
    )
    found = {}
    for each, after in pairwise(body):
        match each, after:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split())
    return found


def first_sentence(text: str) -> str:
    """Return what an option's help shows of its field's docstring."""
    found = _SENTENCE.match(text)
    return text if found is None else found[0]


def _with_options(command: Callable[..., None]) -> Any:
    """Return typer's command of a function, with its own options and those of its config."""
    function = command
    for name, parameter in inspect.signature(command).parameters.items():
        for each in get_args(parameter.annotation):
            if isinstance(each, FromConfig):
                function = _gathering(function, name, each)
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app)


def _gathering(command: Callable[..., None], given: str, source: FromConfig) -> Callable[..., None]:
    """Return a command with an option for every field, in place of the one that takes them all."""
    own = dict(inspect.signature(command).parameters)
    del own[given]
    config = source.load()
    docs = field_docs(config)
    made = {
        each.name: _parameter(each, docs[each.name], source)
        for each in fields(config)
        if (not source.only or each.name in source.only) and each.name not in own
    }
    order = [each.name for each in fields(config) if each.name in made or each.name in own]
    every = {name: (own | made)[name] for name in [*order, *own]}

    def gather(**values: Any) -> None:
        typed = {name: values.pop(name) for name in made}
        command(**values, **{given: {k: v for k, v in typed.items() if v is not None}})

    gather.__annotations__ = {name: each.annotation for name, each in every.items()}
    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in every.values()]
    setattr(gather, "__signature__", inspect.Signature(keywords))  # noqa: B010
    return gather


def _parameter(setting: "Field[Any]", doc: str, source: FromConfig) -> inspect.Parameter:
    """Return a field as the parameter that typer makes an option or argument of."""
    kind = str if source.many else _type_of(setting.type)
    filled_in = source.defaults.get(setting.name)
    is_required = setting.default is MISSING and filled_in is None
    shown = filled_in or _shown(setting, doc)
    said: dict[str, Any] = {"help": first_sentence(doc), "show_default": shown}
    said["autocompletion"] = COMPLETED.get(setting.name)
    if setting.name in source.arguments:
        info = typer.Argument(**said)
    else:
        name = f"--{setting.name.replace('_', '-')}"
        if kind is bool and setting.default:
            name += f"/--no-{setting.name.replace('_', '-')}"
        if kind is tuple:
            said |= {"parser": _numbers, "metavar": "NUMBERS"}
        info = typer.Option(*source.names.get(setting.name, (name,)), **said)
    return inspect.Parameter(
        setting.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[kind if is_required else kind | None, info],
        default=inspect.Parameter.empty if is_required else None,
    )


def _type_of(hint: Any) -> Any:
    """Return the type of what is typed for a field; a text where several kinds are allowed."""
    if get_origin(hint) is tuple:
        return list[get_args(hint)[0]]  # type: ignore[misc]
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if len(kinds) == 1 and get_origin(kinds[0]) is tuple:
        return tuple
    return kinds[0] if len(kinds) == 1 else str


def _numbers(text: str) -> tuple[float, ...]:
    """Return numbers that are joined by commas; ValueError if they are something else."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not numbers joined by commas, such as 0.25,1") from None


def _shown(setting: "Field[Any]", doc: str) -> str | bool:
    """Return the default in words; True leaves it to typer, which shows none."""
    match setting.default:
        case None:
            found = _DEFAULT.search(doc)
            return True if found is None else found[1]
        case bool(value):
            return setting.name if value else True
        case float(value):
            return f"{value:g}"
    return True if setting.default is MISSING else str(setting.default)
