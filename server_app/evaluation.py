"""Central test figures: accuracy, macro-F1, macro-AUC, per class, confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score
from torch import Tensor

from common.datasets import ImageSet
from common.devices import CPU
from common.evaluation import evaluate
from common.model import ModelSpec, build
from common.prior.kept import head_alone
from common.privacy.views import SINGLE
from common.training import to_tensor


class Evaluator:
    """Measures models of one specification on one test set.

    ``views`` is of :data:`common.privacy.views.TEST_VIEWS`: with ``dihedral``, figures are those
    of each image's class probabilities averaged over its flips and quarter turns. ``precision``
    and ``device`` as of :class:`common.training.TrainSettings`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        test: ImageSet,
        class_names: tuple[str, ...],
        *,
        threads: int = 1,
        views: str = SINGLE,
        precision: str = "float32",
        device: str = CPU,
    ) -> None:
        self._model = build(spec)
        self._images: Tensor = to_tensor(test.images)
        self._labels = torch.from_numpy(test.labels)
        self._class_names = class_names
        self._threads = threads
        self._views = views
        self._precision = precision
        self._device = device

    def __call__(self, weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """All figures of ``weights``, JSON-ready; see :func:`figures`."""
        model, weights, inputs = head_alone(self._model, weights, self._images)
        views = self._views if inputs is self._images else SINGLE  # a prior's features are of all
        result = evaluate(
            model, weights, inputs, self._labels,
            threads=self._threads, views=views, precision=self._precision, device=self._device,
        )  # fmt: skip
        shown = figures(self._labels.numpy(), result.probabilities, self._class_names)
        return {"loss": result.loss_sum / result.examples, **shown}


def figures(
    labels: np.ndarray, probabilities: np.ndarray, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Figures of (N,) int labels against (N, K) class probabilities.

    ``macro_auc`` is the mean over classes of the one-against-rest area under the ROC curve; a
    class that does not occur in ``labels`` (or is all of them) has none, and is left out of it.
    """
    classes = np.arange(len(class_names))
    predicted = probabilities.argmax(axis=1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    present = [k for k in classes if 0 < (labels == k).sum() < len(labels)]
    auc = {int(k): float(roc_auc_score(labels == k, probabilities[:, k])) for k in present}
    return {
        "examples": len(labels),
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1[support > 0].mean()),
        "macro_auc": float(np.mean(list(auc.values()))) if auc else None,
        "per_class": [
            {
                "name": class_names[k],
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "f1": float(f1[k]),
                "auc": auc.get(int(k)),
                "support": int(support[k]),
            }
            for k in classes
        ],
        "confusion": confusion_matrix(labels, predicted, labels=classes).tolist(),
    }
