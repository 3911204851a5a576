"""One mask, made and applied, and one encoding, of each protocol by itself."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable

import numpy as np
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_multiply,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

from benchmarks.measure import environment
from benchmarks.secagg.case import MAX_WEIGHT, RANGE, Case
from benchmarks.secagg.figures import Row, ratio
from common.aggregation import flatten
from common.secagg import SecAggParams, encode, update_layout
from common.secagg.masks import KeyStream, add_mask


def measure_masks(parameters: int, *, repeat: int = 9) -> Row:
    """One mask (made and applied) and one encoding of each protocol; median CPU seconds.

    GB/s counts four bytes a parameter for both: what has to be hidden, whatever the generator
    writes (the stock one makes eight).
    """
    case = Case(parameters=parameters, hospitals=5, dropouts=0)
    name = case.names[0]
    update, weight, key = case.update(name), case.weight(name), hashlib.sha256(b"key").digest()
    flat, layers = flatten(update), list(update.values())
    params = SecAggParams(max_cohort=50)
    layout = update_layout(parameters, bound=RANGE, max_weight=MAX_WEIGHT)
    vector = np.zeros(parameters, np.uint32)
    stock = [np.zeros(layer.size, np.int64) for layer in layers]
    shapes = [layer.shape for layer in layers]
    levels, modulus = 1 << 22, 1 << 32
    chunk = memoryview(bytearray(1 << 20))

    def stream() -> None:
        cipher = KeyStream(key)
        for start in range(0, 4 * parameters, len(chunk)):
            cipher.fill(chunk[: min(len(chunk), 4 * parameters - start)])

    def stock_mask() -> None:
        parameters_addition(stock, pseudo_rand_gen(key, modulus, shapes))

    def stock_encode() -> None:
        share = round(weight / MAX_WEIGHT * levels)
        scaled = parameters_multiply(layers, share / levels)
        factor_combine(share, quantize(scaled, RANGE, levels))

    tasks: dict[str, Callable[[], object]] = {
        "mask": lambda: add_mask(vector, key, 1),
        "stock_mask": stock_mask,
        "stream": stream,
        "stock_generator": lambda: pseudo_rand_gen(key, modulus, shapes),
        "encode": lambda: encode(layout, params, {"update": flat}, weight=weight),
        "stock_encode": stock_encode,
    }
    spent: dict[str, list[float]] = {task: [] for task in tasks}
    for _ in range(repeat):
        for task, run in tasks.items():
            before = time.process_time()
            run()
            spent[task].append(time.process_time() - before)
    median = {task: statistics.median(times) for task, times in spent.items()}
    gigabytes = 4 * parameters / 1e9
    row: Row = {"kind": "masks", "parameters": parameters, "repeats": repeat}
    for task, seconds in median.items():
        row[f"{task}_ms"] = 1e3 * seconds
        if "encode" not in task:
            row[f"{task}_gb_per_s"] = gigabytes / seconds if seconds else None
    row["ratio_mask"] = ratio(median["mask"], median["stock_mask"])
    row["ratio_encode"] = ratio(median["encode"], median["stock_encode"])
    return row | {"environment": environment()}
