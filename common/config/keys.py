"""The table of every run-config key, and the texts that are generated from it."""

from __future__ import annotations

from common.config.key import Key
from common.config.recipes import RECIPES
from common.schedule import SCHEDULES

MEDMNIST_2D = (
    "bloodmnist", "breastmnist", "dermamnist", "octmnist", "organamnist", "organcmnist",
    "organsmnist", "pathmnist", "pneumoniamnist", "retinamnist", "tissuemnist",
)  # fmt: skip
"""Single-label 2D MedMNIST sets (chestmnist is multi-label, which the classifier is not)."""

DATASETS = (*MEDMNIST_2D, "npz", "folder", "synthetic", "hospitals")

KEYS: tuple[Key, ...] = (
    Key(name="recipe", default="", choices=("", *RECIPES),
        meaning="a named preset (common/config/recipes.toml): its values stand wherever a key is "
        "at its default"),
    Key(name="mode", default="fedavg", choices=("fedavg", "vectors"),
        meaning="fedavg: synchronous rounds; vectors: task vectors, whenever a hospital has one"),
    Key(name="dataset", default="bloodmnist", choices=DATASETS,
        meaning="a 2D MedMNIST set by name, npz (a file in MedMNIST's form), folder (one folder "
        "a class), synthetic (built in, no real image); hospitals: each node's own pictures (real "
        "machines)"),
    Key(name="data-path", default="",
        meaning="the file or folder for dataset npz or folder"),
    Key(name="image-size", default=28, low=16, high=512,
        meaning="side in pixels: folder and synthetic pictures are brought to it, an npz file must "
        "have it, MedMNIST comes in 28, 64, 128 and 224"),
    Key(name="crop", default=0, low=0, high=10_000,
        meaning="folder: side in pixels of the centre that is cut out before resizing (0: the "
        "whole square; raw PBC pictures: 200)"),
    Key(name="classes", default="",
        meaning="hospitals: names of the classes, separated by commas, as the federation agreed"),
    Key(name="channels", default=3, low=1, high=3,
        meaning="hospitals: 3 for colour, 1 for grey"),
    Key(name="test-data", default="",
        meaning="hospitals: the coordinator's own npz file, whose test split measures the models; "
        "empty: none does"),
    Key(name="hospitals", default=0, low=0, high=4096,
        meaning="hospitals: how many to wait for; 0: all on the roster"),
    Key(name="synthetic-size", default=6000, low=200, high=1_000_000,
        meaning="synthetic: number of images, train, val and test together"),
    Key(name="partition", default="size-skew", choices=("iid", "size-skew", "dirichlet"),
        meaning="how simulated hospitals share one data set: iid; size-skew (the paper's: slices, "
        "up to half moved between pairs); dirichlet (label skew)"),
    Key(name="partition-alpha", default=0.5, low=0.0, low_open=True, high=1000.0,
        meaning="Dirichlet concentration; smaller is more skewed"),
    Key(name="partition-min-size", default=20, low=2, high=1_000_000,
        meaning="fewest images a simulated hospital may hold; less is refused"),
    Key(name="validation-fraction", default=0.2, low=0.02, high=0.5,
        meaning="share of its images that a simulated hospital holds out to validate by (the "
        "paper: 0.2); real hospitals always a fifth"),
    Key(name="rounds", default=36, low=1, high=100_000,
        meaning="synchronous rounds (the paper: 50)"),
    Key(name="fraction", default=1.0, low=0.0, low_open=True, high=1.0,
        meaning="share of the hospitals asked in each round"),
    Key(name="quorum", default=0.8, low=0.0, low_open=True, high=1.0,
        meaning="share of the hospitals asked that must contribute, else the round fails"),
    Key(name="connect-timeout", default=600.0, low=0.0, low_open=True, high=604_800.0,
        meaning="seconds that hospitals have to connect before the first round"),
    Key(name="round-timeout", default=3600.0, low=0.0, low_open=True, high=604_800.0,
        meaning="seconds that hospitals have to train in a round"),
    Key(name="local-epochs", default=1, low=1, high=1000,
        meaning="passes over a hospital's training images in each round (server-step: one step "
        "instead), or for each task vector "
        "(the paper: 3)"),
    Key(name="local-steps", default=0, low=0, high=1_000_000,
        meaning="privacy=none: batches that a hospital trains on in each round, drawn anew each "
        "time, instead of whole passes; the more often models are averaged, the less they drift "
        "apart; 0: local-epochs passes"),
    Key(name="batch-size", default=0, low=0, high=65_536,
        meaning="images a step; under DP the expected size of a Poisson batch; 0: 8, under DP 32"),
    Key(name="learning-rate", default=0.0, low=0.0, high=1000.0,
        meaning="of the hospital's optimizer; 0: 0.0003, under DP 0.001 (the paper's)"),
    Key(name="learning-rate-schedule", default="late-cosine",
        choices=SCHEDULES,
        meaning="over the rounds, or the steps of one task vector: constant; cosine (half a cosine "
        "from learning-rate to 0); late-cosine (constant for 60 % of it, then cosine)"),
    Key(name="optimizer", default="adam", choices=("adam", "sgd"),
        meaning="the hospital's optimizer, fresh each round; with server-step the server's, which "
        "lasts (sgd: momentum 0.9)"),
    Key(name="weight-decay", default=0.0, low=0.0, high=1.0,
        meaning="server-step: so much of the weights is added to the gradient (adam: taken away "
        "beside the step, times the rate); what noise has added fades; free of privacy"),
    Key(name="server-momentum", default=0.0, low=0.0, high=1.0, high_open=True,
        meaning="share of the last round's step that is taken again (FedAvgM); free of privacy"),
    Key(name="model", default="dpresnet",
        choices=("dpresnet", "resnet9", "resnet9-gn", "resnet18", "prior-head"),
        meaning="dpresnet: group norm, the paper's; for comparison resnet9 (batch norm and max "
        "pooling, refused under DP), resnet9-gn and resnet18 (group norm); prior-head: a head "
        "on features that no real image has made (base: a file of `consilium prior`)"),
    Key(name="model-width", default=0.25, low=0.03125, high=4.0,
        meaning="multiplies every layer's channels; 1.0 is the paper's DPResNet (4,802,120 "
        "parameters), 0.25 suits a laptop"),
    Key(name="residual-norm", default=False,
        meaning="one more norm after each residual addition (Klause et al. 2022)"),
    Key(name="weight-standardisation", default=False,
        meaning="convolutions by filters of mean 0 and variance 1/fan-in (De et al. 2022)"),
    Key(name="hidden-units", default=0, low=0, high=4096,
        meaning="of a layer between a prior's features and the head (model=prior-head); 0: the "
        "head is linear"),
    Key(name="frozen", default="",
        meaning="prefixes of parameter names that are not trained, separated by commas (stem,"
        "block1); they stay as in base"),
    Key(name="ema", default=0.0, low=0.0, high=1.0, high_open=True,
        meaning="decay of the exponential moving average of the weights over the rounds, which is "
        "the run's model then; 0: the last weights are; free of privacy"),
    Key(name="test-views", default="single", choices=("single", "dihedral"),
        meaning="dihedral: central test figures of each image's mean prediction over its eight "
        "flips and quarter turns"),
    Key(name="test-every", default=1, low=1, high=100_000,
        meaning="rounds between two measurements with the coordinator's test set; the best round "
        "and the last are measured in any case"),
    Key(name="privacy", default="local", choices=("none", "local", "distributed"),
        meaning="none; local: each hospital's own noise suffices; distributed: each adds a share, "
        "and the noise of the sum suffices (server-step rounds under secure aggregation; less "
        "noise, and a weaker promise: docs/privacy.md)"),
    Key(name="server-step", default=False,
        meaning="each round is one private step over all hospitals' images: they send clipped sums "
        "of gradients, and optimizer and learning-rate are the server's (FedSGD); always so "
        "with privacy=distributed"),
    Key(name="sampling-rate", default=0.0, low=0.0, high=1.0,
        meaning="server-step: each privacy unit is in a round's batch with this probability, the "
        "same at all hospitals; 0: 0.2"),
    Key(name="whitening", default=False,
        meaning="model=prior-head: the first two rounds release the mean and the second moment of "
        "the features, within ε, and every later one trains on whitened features"),
    Key(name="tolerated-colluders", default=1, low=0, high=4096,
        meaning="privacy=distributed: so many hospitals may tell the server their shares of the "
        "noise, and ε holds all the same; below min-cohort"),
    Key(name="privacy-unit", default="image", choices=("image", "patient"),
        meaning="what ε is promised for: one image, or all images of a patient (then data must "
        "say whose each image is)"),
    Key(name="epsilon", default=6.0, low=0.0, low_open=True, high=1000.0,
        meaning="ε of the whole training, all rounds composed, at each hospital, per privacy "
        "unit; validation figures and image counts included; with mode=vectors of ONE vector: the "
        "hospital's ledger adds them up"),
    Key(name="delta", default=1.9e-4, low=0.0, low_open=True, high=1.0, high_open=True,
        meaning="δ of the whole training; should be below 1 / images of a hospital"),
    Key(name="clipping-norm", default=7.0, low=1e-6, high=1e6,
        meaning="largest L2 norm of the gradient of one privacy unit"),
    Key(name="clipping", default="flat", choices=("flat", "automatic"),
        meaning="flat: longer gradients are scaled down to clipping-norm; automatic: all are "
        "scaled to nearly it (Bu et al. 2022), so that it need not be tuned"),
    Key(name="augmentation-multiplicity", default=0, low=0, high=64,
        meaning="so many random views of each image (flipped, turned, shifted) stand for it in a "
        "step; under DP their gradients are averaged before clipping (De et al. 2022); 0: the "
        "image as it is; costs time, no privacy"),
    Key(name="secagg", default=True,
        meaning="secure aggregation: the server sees only sums over the hospitals; mode=vectors "
        "needs false, said aloud"),
    Key(name="num-shares", default=5, low=3, high=101,
        meaning="holders of each hospital's secret shares, itself included; odd, or no fewer "
        "than the hospitals asked"),
    Key(name="reconstruction-threshold", default=4, low=3, high=101,
        meaning="shares that reconstruct a secret; more than 2/3 of num-shares"),
    Key(name="min-cohort", default=4, low=3, high=4096,
        meaning="fewest hospitals whose sum may be revealed; at least the threshold"),
    Key(name="ring-bits", default=0, low=0, high=64,
        meaning="sums are taken modulo 2^ring-bits: 16, 24, 32, ... 64; 0: 32, with server-step 48 "
        "(a finer grid)"),
    Key(name="update-range", default=1.0, low=0.0, low_open=True, high=1e6,
        meaning="largest change of one weight in a round; beyond it is clipped, and the "
        "hospital's log says how often"),
    Key(name="max-examples", default=16_384, low=1, high=1_000_000,
        meaning="most images a hospital counts for under secure aggregation, however many it has"),
    Key(name="defence", default=True,
        meaning="fedavg: watch the opened sums for hospitals that lie (docs/poisoning.md): what is "
        "beyond the agreed images or the norms before is set aside, a model that validates worse "
        "is rolled back, who harms is named and left out"),
    Key(name="halves", default="start", choices=("start", "alarm", "off"),
        meaning="defence: when sums are taken over two disjoint halves of min-cohort hospitals or "
        "more each, which shows whose half harms: in the first two rounds and after alarms, after "
        "alarms only, or never"),
    Key(name="norm-factor", default=2.5, low=1.0, high=1e6,
        meaning="defence: the mean update may be longer than the median of the rounds before by "
        "this factor"),
    Key(name="rollback-margin", default=0.1, low=0.0, high=1.0,
        meaning="defence: share of accuracy that a model may lose, beside what chance explains, "
        "before it is rolled back"),
    Key(name="adopted-by", default="hospitals", choices=("hospitals", "public"),
        meaning="defence: by whose images a model is found worse: the hospitals' validation sums, "
        "which a liar can add to; public: the coordinator's own (the data set's val split; real "
        "hospitals: test-data's), at once"),
    Key(name="weight-cap", default=0.5, low=0.0, low_open=True, high=1.0,
        meaning="defence, secagg=false: largest share of a round's weight that one hospital may "
        "have, never less than an equal one; over sums: the images agreed on in the roster"),
    Key(name="stage-timeout", default=60.0, low=0.0, low_open=True, high=86_400.0,
        meaning="seconds for each stage of secure aggregation after training"),
    Key(name="base", default="",
        meaning="where training starts: path of a .safetensors file (consilium pretrain makes "
        "one), or a run's id; empty: random weights (vectors: see allow-random-base)"),
    Key(name="allow-random-base", default=False,
        meaning="vectors: merge vectors of random weights too; measured to fail (51 % where FedAvg "
        "had 82 %)"),
    Key(name="merge-rule", default="mean",
        meaning="vectors: NAME or NAME key=value …: mean, sum lambda=…, norm-equalised, ties "
        "keep=…, dare drop=…; each takes scale=…"),
    Key(name="publish-every", default=0, low=0, high=4096,
        meaning="vectors: a new base after so many vectors for the current one; 0: half of the "
        "hospitals"),
    Key(name="publish-quorum", default=3, low=1, high=4096,
        meaning="vectors: fewest hospitals whose vectors make a new base"),
    Key(name="publish-margin", default=1.0, low=0.0, high=100.0,
        meaning="vectors: a new base may validate worse than the current one by so many standard "
        "errors, on the images that judged-by names"),
    Key(name="judged-by", default="public", choices=("public", "hospitals", "none"),
        meaning="vectors: who compares a new base with the current one: public images (the data "
        "set's val split; real hospitals: test-data's; without any nothing is checked), the "
        "hospitals on their validation images (secure aggregation of two counts, also with "
        "secagg=false; needs privacy=none), or nobody"),
    Key(name="max-staleness", default=8, low=0, high=100_000,
        meaning="vectors: a vector for a base that is older by more bases than this is refused"),
    Key(name="versions", default=3, low=0, high=100_000,
        meaning="vectors: end after so many new bases; 0: go on until duration"),
    Key(name="duration", default=0.0, low=0.0, high=31_536_000.0,
        meaning="vectors: end after so many seconds; 0: go on until versions"),
    Key(name="vector-timeout", default=86_400.0, low=0.0, low_open=True, high=604_800.0,
        meaning="vectors: seconds after which a hospital that has not answered is asked again"),
    Key(name="simulated-delay", default=0.0, low=0.0, high=86_400.0,
        meaning="simulation: hospital i of n waits i/n times so many seconds before it trains, so "
        "that some are slower"),
    Key(name="roster", default="",
        meaning="coordinator: path of the signed roster; empty: hospitals are not authenticated"),
    Key(name="coordinator-key", default="",
        meaning="coordinator: its public key (base64), under which the roster is signed"),
    Key(name="threads", default=1, low=1, high=256,
        meaning="CPU threads of one simulated hospital's training"),
    Key(name="precision", default="float32", choices=("float32", "bfloat16"),
        meaning="of forward and backward passes in training; bfloat16: where the CPU has it; "
        "weights, norms and sums stay float32 or better"),
    Key(name="device", default="auto", choices=("auto", "cpu", "cuda"),
        meaning="where models are trained and tested; auto: a GPU that the process sees, else the "
        "CPU (prior-head, which is small: the CPU)"),
    Key(name="seed", default=0, low=0, high=2**31 - 1,
        meaning="of partition, initial weights and non-private batches; never of DP noise"),
    Key(name="resume", default="",
        meaning="id of a run to go on with from its last complete round"),
)  # fmt: skip

BY_NAME: dict[str, Key] = {key.name: key for key in KEYS}


def toml_table() -> str:
    """The body of ``[tool.flwr.app.config]`` in pyproject.toml."""
    return "\n".join(f"{key.name} = {key.as_toml()}" for key in KEYS) + "\n"


def markdown_table() -> str:
    """The README's table of keys."""
    rows = [
        f"| `{k.name}` | {k.kind} | `{k.as_toml()}` | {k.allowed} | {k.meaning} |" for k in KEYS
    ]
    return "\n".join(
        ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|", *rows]
    )
