"""The configuration of a run: frozen dataclasses, one for each section of the YAML file.

The keys of one kind of model lie in its file under model/kinds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml

from dist_vasp.config.metric_names import Metric, parse_metrics
from dist_vasp.model.registry import KINDS, CheckedKeys, ModelKeys, OptimizerKeys, kind_of

SECTIONS = ("data", "model", "search", "loss", "optimizer", "parallel", "run")


@dataclass(frozen=True)
class Stage:
    """A stretch of the learning-rate schedule."""

    epochs: int
    """Epochs at this rate."""
    lr: float
    """Learning rate."""


@dataclass(frozen=True)
class DataConfig:
    """data: what is read, and how."""

    shards: str = ""
    """Folder that `python -m data_tools.shard` wrote."""
    auxiliary: str = ""
    """Another such folder, with weaker interactions of the same users: views beside purchases, or
    all ratings beside the high ones. model.kind ease counts what shards does not hold of its
    training users as model.ease_auxiliary each."""
    batch_size: int = 1024
    """Users per optimizer step over all ranks; with halves each user gives two rows."""
    halves: bool | None = None
    """Split each user's items anew every epoch into halves that predict each other; null: yes,
    except for model.kind nease, multvae, recvae and autorec."""
    input_dropout: float = 0.0
    """Share of the inputs' interactions that is left out, drawn anew every epoch; targets keep all
    of theirs."""
    ratings: bool = False
    """Train on the ratings that the shards keep (keep_ratings of data_tools.shard), not on zeros
    and ones: autorec's inputs are ratings, and its loss is that of the observed ones."""
    workers: int = 1
    """Loader processes per rank that run ahead of training; 0 loads in the training process."""


@dataclass(frozen=True)
class ModelKind:
    """The key of `model` that all kinds share."""

    kind: Literal[tuple(KINDS)] = "vasp"  # type: ignore[valid-type]
    """vasp multiplies flvae and nease, which also train alone; wide_deep adds their logits; multvae
    is a shallow variational autoencoder; recvae is one with a composite prior, whose encoder and
    decoder are trained in turn; autorec is an autoencoder of one hidden layer; ease and
    puresvd are closed forms, a matrix of items x items and a singular value decomposition, and use
    neither loss nor optimizer."""


@dataclass(frozen=True)
class ModelConfig(ModelKeys, ModelKind, CheckedKeys):
    """model: its kind, and the keys of the kinds."""


@dataclass(frozen=True)
class SearchConfig:
    """search: values of a closed form's keys to choose from on validation.

    Every combination is tried; an empty list leaves the key as it is in `model`.
    """

    rule: Literal["best", "one_standard_error"] = "best"
    """best takes the setting with the best validation metric; one_standard_error takes the largest
    lambda whose metric is at most one standard error below that, with the same other keys (Breiman
    et al. 1984, section 3.4.3), for one more fit where that is another lambda."""

    ease_user_exponent: list[float] = field(default_factory=list)
    """Values of model.ease_user_exponent."""
    ease_item_exponent: list[float] = field(default_factory=list)
    """Values of model.ease_item_exponent."""
    ease_lambda_exponent: list[float] = field(default_factory=list)
    """Values of model.ease_lambda_exponent."""
    ease_dropout: list[float] = field(default_factory=list)
    """Values of model.ease_dropout."""
    ease_xi: list[float] = field(default_factory=list)
    """Values of model.ease_xi."""
    ease_auxiliary: list[float] = field(default_factory=list)
    """Values of model.ease_auxiliary."""
    ease_lambda: list[float] = field(default_factory=list)
    """Values of model.ease_lambda, tried from large to small for each combination of the others
    until the validation metric has fallen twice in a row; empty with model.ease_lambda 0: 5120 to
    10, halved each time."""
    svd_rank: list[int] = field(default_factory=list)
    """Values of model.svd_rank."""
    svd_user_exponent: list[float] = field(default_factory=list)
    """Values of model.svd_user_exponent."""
    svd_item_exponent: list[float] = field(default_factory=list)
    """Values of model.svd_item_exponent."""

    @property
    def lists(self) -> dict[str, list[Any]]:
        """The values of every key that can be searched."""
        return {name: values for name, values in asdict(self).items() if name != "rule"}


@dataclass(frozen=True)
class LossConfig:
    """loss: what is minimised."""

    kind: Literal["focal", "cosine", "mse", "bce", "multinomial", "squared"] = "focal"
    """focal for vasp, wide_deep, flvae and nease; cosine, mse, bce for nease; multinomial for
    flvae, multvae and recvae; squared, the squared error of a score that is no probability, for
    autorec."""
    alpha: float = 0.25
    """Focal weight of the ones; the zeros weigh 1 - alpha."""
    gamma: float = 2.0
    """Focal exponent."""
    kl_weight: float = 1.0
    """Weight of the KL divergence: mean over rows and over latent dimensions; multvae takes the sum
    over latent dimensions; recvae takes it times the interactions of the row (the paper's gamma,
    .005)."""
    kl_anneal_steps: int = 0
    """Steps over which the weight of the KL divergence rises linearly from 0 to kl_weight; 0: it is
    kl_weight from the start."""

    def kl_weight_at(self, step: int) -> float:
        """Weight of the KL divergence in the step after `step` others (Liang et al. 2018, 2.2)."""
        if step >= self.kl_anneal_steps:
            return self.kl_weight
        return self.kl_weight * step / self.kl_anneal_steps


@dataclass(frozen=True)
class UpdateRule:
    """The keys of `optimizer` that all kinds share."""

    name: Literal["nadam", "adam", "adamw"] = "nadam"
    """Update rule."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-7
    """Added to the root of the second moment."""
    momentum_decay: float = 4e-3
    """Nadam's momentum decay."""
    item_state: Literal["full", "lean"] = "full"
    """Second moments of the item matrices: one per weight, or (lean) one per row, which costs next
    to no memory."""
    weight_decay: float = 0.0
    """Decoupled weight decay; adamw only."""
    l2: float = 0.0
    """L2 regularisation of the item matrices, not of biases and trunk: their gradient grows by this
    times the weights. Reported losses leave it out."""
    clip_norm: float = 0.0
    """Largest joint gradient norm of trunk and item matrices; 0 does not clip."""
    accumulation: int = 1
    """Micro-batches per optimizer step; changes memory, not the result."""
    reset_on_stage: bool = False
    """Forget the moments where the learning rate changes, as the authors' code does."""
    schedule: list[Stage] = field(
        default_factory=lambda: [Stage(50, 5e-5), Stage(20, 1e-5), Stage(20, 1e-6)]
    )
    """Stages of the learning rate; their epochs add up to the run."""


@dataclass(frozen=True)
class OptimizerConfig(OptimizerKeys, UpdateRule, CheckedKeys):
    """optimizer: one update rule for the trunk and the item matrices."""


@dataclass(frozen=True)
class ParallelConfig:
    """parallel: how ranks share the work; changes speed and memory, not the result."""

    partitions: int = 0
    """Ranks that share one copy of the item matrices; 0: all ranks of a replica."""
    replicas: int = 1
    """Copies of the item matrices."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage of the trunk, 0 to 3: what of it is partitioned over all ranks."""
    lanes: int = 48
    """Reading lanes: a multiple of the number of ranks, at most batch_size.

    Part of the order of users: keep it when resuming.
    """
    block_columns: int = 0
    """Items of a block of the output side on a CPU, which is made, used and dropped before the
    next; 0: 256. A GPU takes as many as fit."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Compile the loss and the update with torch.compile (needs g++ on a CPU); auto: where a rank
    holds 4M item weights or more."""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """Of matrix products: fp32; tf32, on GPUs; bf16, with float32 sums; auto: bf16 on a GPU that
    has it, else fp32.

    Weights, moments, losses and closed forms are float32 or more in each.
    """
    trunk_dtype: Literal["", "fp32", "bf16"] = ""
    """Earlier name of `precision`, which it sets; use `precision`."""
    interface: str = ""
    """Network interface of gloo and NCCL; empty: the loopback on one machine, else the libraries'
    choice."""

    @property
    def wanted_precision(self) -> str:
        """`precision`, also where its earlier name is used."""
        return self.trunk_dtype or self.precision


@dataclass(frozen=True)
class RunConfig:
    """run: where results go and how often."""

    dir: str = ""
    """Folder of the run: metrics, checkpoints, result.json.

    A run that stopped goes on from here.
    """
    seed: int = 0
    """Seed of initialisation, order, halves and noise."""
    max_steps: int = 0
    """Stop after this many optimizer steps in total; 0: the whole schedule."""
    checkpoint_every_steps: int = 0
    """Save every so many steps; 0: at the end of every epoch."""
    keep: int = 2
    """Newest checkpoints to keep, besides the best."""
    evaluate_every_epochs: int = 1
    """Evaluate on validation every so many epochs; 0: never."""
    recall_denominator: Literal["min", "held_out"] = "min"
    """Recall@k divides by min(k, held-out items), or (held_out, as in LightGCN's literature) by all
    held-out items."""
    metrics: str = ""
    """Further metrics of every evaluation, by name and list length, such as ndcg@10,hr@10 (ndcg,
    recall, precision, hr, mrr, map, novelty, coverage, gini, diversity); the default ones are
    always computed."""
    best_by: str = "ndcg@100"
    """Validation metric that decides which checkpoint, or which lambda of a closed form, is the
    best: one of ndcg, recall, precision, hr, mrr, map at any list length."""
    wandb: str = ""
    """Project of Weights & Biases that also gets the metrics; empty: none.

    Needs the library wandb.
    """
    mlflow: str = ""
    """Tracking URI of MLflow (a server, or a folder) that also gets the metrics; empty: none.

    Needs the library mlflow.
    """

    @property
    def asked_metrics(self) -> tuple[Metric, ...]:
        """The metrics that `metrics` names, and before them that of `best_by` unless it is the
        default one."""
        asked = parse_metrics(self.metrics, "run.metrics")
        if self.best_by == RunConfig.best_by:
            return asked
        return tuple(dict.fromkeys((*parse_metrics(self.best_by, "run.best_by"), *asked)))

    @property
    def told_metrics(self) -> tuple[Metric, ...]:
        """The metrics that a line about an evaluation tells, that of `best_by` first; none for the
        default ones."""
        best = parse_metrics(self.best_by, "run.best_by")
        return tuple(dict.fromkeys((*best, *self.asked_metrics))) if self.asked_metrics else ()


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RunConfig = field(default_factory=RunConfig)
    device: str = "auto"
    """auto (CUDA where there is one), cuda or cpu."""

    @property
    def halves(self) -> bool:
        default = kind_of(self.model.kind).halves
        return default if self.data.halves is None else self.data.halves

    @property
    def ratings(self) -> bool:
        """Whether the model reads ratings."""
        return self.data.ratings and kind_of(self.model.kind).reads_ratings

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.optimizer.schedule)

    def lr(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0; beyond the schedule the last one."""
        for stage in self.optimizer.schedule:
            if epoch < stage.epochs:
                return stage.lr
            epoch -= stage.epochs
        return self.optimizer.schedule[-1].lr

    def stage(self, epoch: int) -> int:
        """Index of the schedule's stage that `epoch` lies in."""
        for index, stage in enumerate(self.optimizer.schedule):
            if epoch < stage.epochs:
                return index
            epoch -= stage.epochs
        return len(self.optimizer.schedule) - 1

    def to_yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False)
