"""The values people write: frozen pydantic models, strict, with errors that name the key's path.

Imports no other part of the library but its errors. Names of data sets, nets, methods and presets are checked in
`experiment.py`, which knows the registries.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from distillery.errors import UserError, choices, nearest

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**53)]  # numbers travel as JSON doubles on KFP


def _none_or_three(values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (0, 3):
        raise ValueError(f"expected three numbers, one per channel, got {len(values)}")
    return values


PerChannel = Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], AfterValidator(_none_or_three)]
PositivePerChannel = Annotated[tuple[Positive, ...], AfterValidator(_none_or_three)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
NameOrNone = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,62})?$")]
Scalar = bool | int | float | str

STEPS = ("prepare_data", "train_teacher", "gather_teachers", "synthesize", "relabel", "evaluate_student")
SHARED = STEPS[:3]  # made once for several cells


def _rising(values: tuple[float, float]) -> tuple[float, float]:
    if not 0 < values[0] <= values[1]:
        raise ValueError(f"expected two shares of the area above 0, the smaller one first, got {values}")
    return values


Area = Annotated[tuple[Fraction, Fraction], AfterValidator(_rising)]
MAX_TEXT, MAX_VALUES = 2**20, 100_000  # of an experiment: characters, values


class Strict(BaseModel):
    """Base of every configuration model: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Options(Strict):
    """Base of a method's `Config`."""


class DatasetConfig(Strict):
    """Which real images, and where they are."""

    name: str  # one of the data sets below
    root: str = ""  # folder in torchvision's layout, s3:// prefix, or "" for the cache
    download: bool = False  # let torchvision fetch the set, with its checksums
    size: Annotated[int, Field(ge=0, le=1024)] = 0  # pixels; 0 = the data set's own
    per_class: Whole = 0  # the first n training images of each class; 0 = all
    on_unreadable: Literal["fail", "skip"] = "fail"  # an image that cannot be read stops the run, or is left out
    max_unreadable: Whole = 10  # how many may be left out
    store: str = ""  # URI: photo shards are published there and only referenced


class TeacherConfig(Strict):
    """A network that scores, selects and labels; trained here or given."""

    name: NameOrNone = ""  # what methods call it; "" = the net's name
    net: str = "convnet3"  # a name of the table of nets
    net_options: dict[str, Scalar] = {}  # options of that net, for example width
    weights: str = ""  # safetensors path or URI, or torchvision:NAME; "" = train it here
    classes: tuple[str, ...] = ()  # class order of given weights; () = the data set's
    mean: PerChannel = ()  # normalisation of given weights; () = the data set's
    std: PositivePerChannel = ()  # the same of the deviations
    seed: Seed = 0  # of weights, order and augmentation
    epochs: Count = 12  # passes over the training images
    batch: Count = 256  # images per step
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with Nesterov momentum, or AdamW
    lr: Positive = 0.2  # highest learning rate
    momentum: Fraction = 0.9  # of SGD
    weight_decay: Weight = 5e-4  # on all parameters
    schedule: Literal["onecycle", "cosine"] = "onecycle"  # of the learning rate
    warmup: Fraction = 0.2  # share of the steps spent rising to lr
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # share of the target spread over all classes
    crop_pad: Whole = 4  # zero padding of the random crop (tensors up to 64 px)
    crop_scale: Area = (0.08, 1.0)  # of the random resized crop (photos)
    flip: Fraction = 0.5  # probability of a horizontal flip
    stop_at: Fraction = 0.0  # stop once validation accuracy reaches this; 0 = never
    min_accuracy: Fraction = 0.0  # gate: below this nothing is spent on synthesis
    expected_accuracy: Fraction = 0.0  # gate for given weights: within `tolerance` of this
    tolerance: Fraction = 0.003  # half the width of that gate


class ViewPolicy(Strict):
    """How one augmented view of an image is drawn; the same law for teacher and student."""

    crop: Literal["none", "pad", "rrc"] = "none"  # none, after zero padding, or random resized crop
    crop_pad: Whole = 4  # pixels of padding
    crop_scale: tuple[Positive, Positive] = (0.08, 1.0)  # share of the area that a resized crop keeps
    crop_ratio: tuple[Positive, Positive] = (0.75, 4.0 / 3.0)  # its width by height
    flip: Fraction = 0.5  # probability of a horizontal flip
    shuffle_patches: Count = 1  # strips per axis permuted (RDED); 1 = off
    randaugment_n: Whole = 0  # operations per view; 0 = off
    randaugment_m: Weight = 0.0  # their magnitude, 0 to 30
    dsa: str = ""  # for example color_crop_cutout_flip_scale_rotate
    mix: Literal["none", "cutmix", "mixup"] = "none"  # CutMix or MixUp of the views of a batch
    mix_alpha: Positive = 1.0  # of the Beta distribution of the share


class Recipe(Strict):
    """How a student is trained and with which labels."""

    name: str  # what reports call it; the preset's unless written
    regime: Literal["soft", "hard"] = "soft"  # the teacher's labels, or the class alone
    epochs: Count = 300  # passes over the synthetic images
    batch: Count = 50  # images per step
    optimizer: Literal["adamw", "sgd"] = "adamw"  # AdamW, or SGD with momentum
    lr: Positive = 1e-3  # highest learning rate
    momentum: Fraction = 0.9  # of SGD
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # of AdamW
    weight_decay: Weight = 0.01  # see decay_filter
    decay_filter: Literal["all", "matrices"] = "all"  # what weight_decay acts on
    schedule: Literal["cosine", "step", "constant"] = "cosine"  # of the learning rate
    zeta: Positive = 1.0  # cosine over zeta times the run: 2 ends at half the lr
    warmup_epochs: Whole = 0  # epochs spent rising to lr
    step_at: tuple[Fraction, ...] = ()  # shares of the run
    step_gamma: Positive = 0.1  # times the learning rate at each of step_at
    loss: Literal["kl", "mse_ce", "ce"] = "kl"  # KL to the soft labels, MSE to them plus CE, or CE
    temperature: Positive = 20.0  # of the KL
    kl_t2: bool = False  # multiply the KL by temperature squared
    ce_weight: Weight = 0.0  # gamma of MSE + gamma CE
    teacher_mode: Literal["eval", "bssl", "train"] = "eval"  # how its BatchNorm normalises while it labels
    bn_momentum: Fraction = 0.1  # of the student's BatchNorm
    ema: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # of a running mean of the weights; 0 = off
    views: ViewPolicy = ViewPolicy()  # augmentation
    evaluate_every: Whole = 0  # epochs; 0 = a sparse curve and six in the last fifth


class LabelConfig(Strict):
    """Where the soft labels are made: beside the student, or beforehand."""

    mode: Literal["on_the_fly", "stored"] = "on_the_fly"  # beside the student, or in a file before it
    top_k: Whole = 0  # stored only: logits kept per view; 0 = all


class StudentChoice(Strict):
    """A student as written in an experiment: a preset's name, or `{preset: NAME, key: value}`."""

    net: str  # a name of the table of nets
    net_options: dict[str, Scalar] = {}  # options of that net
    recipe: str | dict[str, Any] = "fair-soft"  # a preset, or {preset: NAME, key: value}


class MethodChoice(Strict):
    """Cells of one method: every ipc with every seed."""

    method: str  # a name of the methods
    ipc: Annotated[tuple[Count, ...], Field(min_length=1)]  # images per class
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)  # of the images and of the students
    options: dict[str, Any] = {}  # the method's own; its page lists them
    shards: Count = 1  # pieces in which each cell's images are made; changes no image
    teachers: tuple[str, ...] = ()  # names; () = all where the method can use several, else the first


class Student(Strict):
    """A student with its recipe resolved."""

    net: str
    net_options: dict[str, Scalar] = {}
    recipe: Recipe


class Cell(Strict):
    """One distillation: a method, an IPC and a seed, with everything that can change its numbers."""

    id: str
    name: str
    dataset: DatasetConfig
    teachers: Annotated[tuple[str, ...], Field(min_length=1)]  # names; their artifacts carry the rest
    method: str
    ipc: Count
    seed: Seed
    options: dict[str, Any]
    shards: Count = 1
    labels: LabelConfig
    students: tuple[Student, ...]
    device: str
    precision: str
    code_version: str
    stop_on_failure: bool
    synthesize_cpu: str = ""  # what the step's pod asks for, see profiles.py
    synthesize_memory: str = ""
    synthesize_gpus: str = ""
    gather_pieces_cpu: str = ""
    gather_pieces_memory: str = ""
    gather_pieces_gpus: str = ""
    relabel_cpu: str = ""
    relabel_memory: str = ""
    relabel_gpus: str = ""
    evaluate_student_cpu: str = ""
    evaluate_student_memory: str = ""
    evaluate_student_gpus: str = ""


class Piece(Cell):
    """One of a cell's shards: what its synthesis needs of the cell (so no students), and which one it is."""

    shard: Whole


class Experiment(Strict):
    """What is compared: data, teachers, methods, students."""

    name: Name  # of the run and of its output
    dataset: DatasetConfig  # real images
    teacher: TeacherConfig | None = None  # the only one, ...
    teachers: tuple[TeacherConfig, ...] = ()  # ... or several; neither = a default one
    methods: Annotated[tuple[MethodChoice, ...], Field(min_length=1)]  # what is compared
    students: Annotated[tuple[StudentChoice, ...], Field(min_length=1)]  # what is trained on the images
    labels: LabelConfig = LabelConfig()  # how soft labels are made
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on a GPU, fp32 on a CPU
    stop_on_failure: bool = False  # a failed cell stops the run
    profile: str = "cpu"  # what the pods of each step ask for, see profiles.py

    @property
    def every_teacher(self) -> tuple[TeacherConfig, ...]:
        """All teachers, each with its name."""
        written = self.teachers or (self.teacher or TeacherConfig(),)
        return tuple(each.model_copy(update={"name": each.name or each.net}) for each in written)


M = TypeVar("M", bound=BaseModel)


class _NoDuplicates(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML that refuses a key written twice (PyYAML keeps the last one silently)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.value))
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise UserError(f"line {key_node.start_mark.line + 1}: the key {key[1]!r} is written twice; keep one")
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text.

    Raises:
        UserError: not YAML, not a mapping, or a key twice; `where` names the source.
    """
    try:
        if len(text) > MAX_TEXT:
            raise UserError(f"{len(text)} characters, more than an experiment can have ({MAX_TEXT})")
        data = yaml.load(text, _NoDuplicates)  # noqa: S506 - a SafeLoader
        if (count := _expanded(data, {})) > MAX_VALUES:  # a few aliases of aliases can stand for billions of values
            raise UserError(f"{count} values when its aliases are written out, more than {MAX_VALUES}")
        data = json.loads(json.dumps(data, default=str))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise UserError(f"{where}: not readable as YAML: {str(error)[:500]}") from error
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a mapping of keys such as name and dataset, got {short(data)}")
    return data


def _expanded(data: Any, known: dict[int, int]) -> int:
    """How many values there are when every alias is written out."""
    if not isinstance(data, dict | list):
        return 1
    if id(data) not in known:
        inside = data.values() if isinstance(data, dict) else data
        known[id(data)] = 1 + sum(_expanded(value, known) for value in inside)
    return known[id(data)]


def parse(model: type[M], data: dict[str, Any], where: str) -> M:
    """Validate a plain mapping strictly.

    Args:
        model: the model to build.
        data: JSON-like values; whole floats are taken as integers where an integer is expected, because KFP sends
            every number inside a dict as a float.
        where: names the source in errors.

    Raises:
        UserError: one line per fault: key path, value, what is allowed, nearest known key.
    """
    try:
        return model.model_validate_json(json.dumps(_whole_numbers(data)))
    except (TypeError, ValueError) as error:
        if not isinstance(error, pydantic.ValidationError):
            raise UserError(f"{where}: {error}") from error
        lines = [_explain(model, fault) for fault in _roots(error.errors(include_url=False))[:8]]
        raise UserError(f"{where}: " + "\n  ".join(["", *lines] if len(lines) > 1 else lines)) from error


def plain(model: BaseModel) -> dict[str, Any]:
    """The model as JSON values (what manifests and cells carry)."""
    data: dict[str, Any] = model.model_dump(mode="json")
    return data


def canonical(value: object) -> str:
    """JSON with sorted keys: equal values, equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _whole_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(v) for v in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _roots(faults: list[Any]) -> list[Any]:
    """Without the faults that only say that something inside them is at fault."""
    paths = [fault["loc"] for fault in faults]
    return [f for f in faults if not any(len(p) > len(f["loc"]) and p[: len(f["loc"])] == f["loc"] for p in paths)]


def _explain(model: type[BaseModel], fault: Any) -> str:
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in fault["loc"]).lstrip(".") or "(top)"
    value = short(fault.get("input"))
    if fault["type"] == "extra_forbidden":
        known = _fields_at(model, fault["loc"][:-1])
        return f"{place}: unknown key{nearest(fault['loc'][-1], known)}; known keys: {choices(known)}"
    if fault["type"] == "missing":
        return f"{place}: required and not given"
    return f"{place}: {fault['msg']}, got {value}"


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that a fault's path leads to."""
    kind: Any = model
    for part in path:
        if isinstance(part, str) and isinstance(kind, type) and issubclass(kind, BaseModel):
            found = kind.model_fields.get(part)
            kind = found.annotation if found else kind
        kind = _model_in(kind) or kind
    return sorted(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _model_in(kind: Any) -> type[BaseModel] | None:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((found for arg in get_args(kind) if (found := _model_in(arg))), None)


def short(value: object) -> str:
    """A value as an error shows it: cut where it gets long."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
