"""A workflow as a program knows it: its name, its version, and its types."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, Generic, Union, get_args, get_origin, is_typeddict

import attrs
from typing_extensions import TypeVar  # typing's has defaults from Python 3.13 on

from promptlayer_exec._values.text import short_repr

if TYPE_CHECKING:
    from typing_extensions import TypeForm

# Any is the default, so a name alone, which has no types, needs no overload.
OutputT = TypeVar("OutputT", default=Any)
InputsT = TypeVar("InputsT", default=Any)


def _copied(metadata: Mapping[str, str] | None) -> Mapping[str, str] | None:
    if isinstance(metadata, Mapping):
        return dict(metadata)
    return metadata  # a start request refuses it


@attrs.frozen(repr=False)
class Workflow(Generic[OutputT, InputsT]):
    """A workflow as your program knows it.

    Describe it once, and pass it instead of its name::

        write_report = Workflow("write-report", inputs=Topic, output=Report, label="prod")

        report = await session.run(write_report, Topic("otters"))  # a Report

    Every call that takes a name also takes a `Workflow`. It is a plain value without a session, so
    it can be a constant of a module. To change it, use `attrs.evolve`.

    Args:
        name: its name or id.
        inputs: the type of its inputs, an attrs class, dataclass, TypedDict or pydantic model. Type
            checkers compare your inputs with it. Inputs from web clients and agents must match it.
        output: the type of its main output, as for `Execution.output(into=...)`. By default, the
            output arrives unchanged.
        label: the label of the version to run, not allowed with `version`.
        version: the number of the version to run, not allowed with `label`. If a call passes a
            label or a version, it replaces both of these.
        metadata: strings to store with each run. Entries that a call passes take precedence.
        description: what the workflow does, how long it takes and when to use it. Agents read it.

    Raises:
        TypeError: the name is neither a str nor an int, or a type is given as a string.
        ValueError: both `label` and `version` are given.
    """

    name: str | int
    # `None` cannot be the default of a type: it is a type itself.
    inputs: TypeForm[InputsT] = attrs.field(default=Any, kw_only=True)  # type: ignore[assignment]
    output: TypeForm[OutputT] = attrs.field(default=Any, kw_only=True)  # type: ignore[assignment]
    label: str | None = attrs.field(default=None, kw_only=True)
    version: int | None = attrs.field(default=None, kw_only=True)
    metadata: Mapping[str, str] | None = attrs.field(
        default=None, kw_only=True, converter=_copied, hash=False
    )
    description: str | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if isinstance(self.name, bool) or not isinstance(self.name, str | int):
            raise TypeError(f"workflow must be a name or an int id, got {self.name!r:.100}")
        if self.label is not None and self.version is not None:
            raise ValueError("pass either label or version, not both")

        for argument, form in (("inputs", self.inputs), ("output", self.output)):
            if isinstance(form, str):
                raise TypeError(
                    f"{argument} must be a type, such as the class {form:.100}, not its name"
                )

    def __repr__(self) -> str:
        version = ""
        if self.label is not None:
            version = f" label {self.label!r:.100}"
        elif self.version is not None:
            version = f" version {self.version}"

        types = ""
        if self.inputs is not Any or self.output is not Any:
            types = f": {_type_name(self.inputs)} -> {_type_name(self.output)}"
        return f"<Workflow {short_repr(self.name)}{version}{types}>"


def _type_name(form: Any) -> str:
    if isinstance(form, type) and get_origin(form) is None:
        return f"{form.__qualname__:.100}"
    return f"{form!s:.100}".removeprefix("typing.")


def name_of(workflow: str | int | Workflow[Any, Any]) -> str | int:
    """Return the name or id by which the server knows a workflow."""
    if isinstance(workflow, Workflow):
        return workflow.name
    return workflow


def check_class_of_inputs(workflow: Workflow[Any, Any], inputs: Any) -> None:
    """Raise `TypeError` for an instance of another class than that of the workflow's inputs.

    A mapping may stand for it: it is checked like the inputs of a workflow without a type.
    """
    if isinstance(inputs, Mapping) or _may_be(inputs, workflow.inputs):
        return
    raise TypeError(
        f"workflow {workflow.name!r:.100} takes inputs of type {_type_name(workflow.inputs)},"
        f" got {type(inputs).__qualname__:.100}"
    )


def _may_be(value: Any, form: Any) -> bool:
    """Return False only if a value, which is no mapping, is certainly not of a type."""
    kind = get_origin(form) or form
    if kind in (Union, UnionType):
        return any(_may_be(value, member) for member in get_args(form))
    if is_typeddict(kind):
        return False

    try:
        return kind is Any or not isinstance(kind, type) or isinstance(value, kind)
    except TypeError:  # a protocol
        return True
