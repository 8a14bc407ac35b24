"""Trains the network on some months, exports it and logs it to Headrace, ready to be delivered: `python train.py --months=1-3`.

Run by a Headrace trainer it logs into the run that the trainer made; run by hand it starts one (see README.md).
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from pathlib import Path
from typing import Any

import export
import fragile
import headrace
import numpy as np
import pyarrow as pa
import torch
from data import load
from features import CATEGORIES, LABEL, OUTPUT, signature, tensors
from model import Ensemble, encode, fit, vocabulary_of

EXPERIMENT = "flight-delays"
DATASET = "flights-2013"
SAMPLE_ROWS = 32

OVERFIT_ROWS = 400
OVERFIT_EPOCHS = 120


def months_of(text: str) -> list[int]:
    """`3` or `1-3` as a list of months; raises argparse.ArgumentTypeError."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first) <= 12:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a month like 1 nor a range like 1-3")
    return list(range(int(first), int(last or first) + 1))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a late flight is scored above a punctual one, ties counting half."""
    _, positions, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[positions]
    late = labels == 1
    n_late, n_punctual = int(late.sum()), int((~late).sum())
    return float((ranks[late].sum() - n_late * (n_late + 1) / 2) / (n_late * n_punctual))


def train(table: pa.Table, args: argparse.Namespace, run: headrace.Run) -> tuple[torch.nn.Module, dict[str, list[str]]]:
    """The trained network of the wanted variant and the vocabulary of its categories; logs the loss of each epoch."""
    vocabulary = vocabulary_of(table)
    labels = table[LABEL].to_numpy()
    if args.variant == "overfit":
        # A challenger that learns a few flights by heart: almost perfect on them, no better than chance on others.
        few = np.sort(np.random.default_rng(args.seed).choice(len(table), OVERFIT_ROWS, replace=False))
        network = fit(
            table.take(few),
            labels[few],
            vocabulary,
            seed=args.seed,
            epochs=OVERFIT_EPOCHS,
            batch=64,
            dropout=0.0,
            weight_decay=0.0,
            on_epoch=lambda epoch, loss: tell(run, "loss", epoch, loss),
        )
        return network, vocabulary
    # The fragile variant is, on paper, the best of all: two networks instead of one.
    seeds = (args.seed + 1, args.seed + 2) if args.variant == "fragile" else (args.seed,)
    members = []
    for i, seed in enumerate(seeds):
        name = "loss" if i == 0 else f"loss_{i}"
        members.append(
            fit(table, labels, vocabulary, seed=seed, epochs=args.epochs, on_epoch=lambda e, loss, n=name: tell(run, n, e, loss))
        )
    return (members[0] if len(members) == 1 else Ensemble(members).eval()), vocabulary


def tell(run: headrace.Run, name: str, epoch: int, loss: float) -> None:
    """The loss of an epoch: for the charts, and now and then for whoever watches."""
    run.log_metric(name, loss, epoch)
    if epoch < 10 or epoch % 20 == 0:
        print(f"epoch {epoch}: {name} {loss:.4f}")


def sample(network: torch.nn.Module, vocabulary: dict[str, list[str]], table: pa.Table) -> dict[str, dict[str, list[Any]]]:
    """Some rows and what the network itself, not its export, says of them: the exported file must say the same."""
    rows = table.take(np.linspace(0, len(table) - 1, SAMPLE_ROWS, dtype=np.int64))
    with torch.no_grad():
        probabilities = network(*encode(rows, vocabulary))
    return {
        "inputs": {name: values.tolist() for name, values in tensors(rows).items()},
        "outputs": {OUTPUT: probabilities.tolist()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--months", type=months_of, default="1-3", metavar="M[-N]", help="months of 2013 to train on (default 1-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument(
        "--variant",
        choices=("plain", "overfit", "fragile"),
        default="plain",
        help="overfit: does not generalise; fragile: good on the holdout, broken in serving",
    )
    args = parser.parse_args()
    # One thread: the network is small, so more of them cost more than they bring, and one gives the same result everywhere.
    torch.set_num_threads(1)

    name = f"months {args.months[0]}-{args.months[-1]}, {args.variant}"
    with headrace.start_run(experiment=EXPERIMENT, name=name) as run, tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "flights.zip"
        data = headrace.pull_dataset(DATASET, archive)
        run.log_input(data.name, data.version)
        table = load(archive, args.months)
        print(f"{len(table)} flights of {data.name} version {data.version}")
        run.log_params(
            {
                "months": f"{args.months[0]}-{args.months[-1]}",
                "rows": len(table),
                "variant": args.variant,
                "seed": args.seed,
                "epochs": args.epochs if args.variant != "overfit" else OVERFIT_EPOCHS,
                "torch": torch.__version__,
            }
        )

        network, vocabulary = train(table, args, run)
        with torch.no_grad():
            scores = network(*encode(table, vocabulary)).numpy()[:, 0]
        run.log_metric("train_auc", auc(table[LABEL].to_numpy(), scores))

        model = export.build(network, vocabulary, table)
        if args.variant == "fragile":
            model = fragile.add_season(model)
        file = Path(folder) / "model.onnx"
        export.save(model, file)
        run.log_model(file, signature=signature(), samples=sample(network, vocabulary, table))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"logged {file.stat().st_size} bytes of ONNX, sha256 {digest}; it knows {len(vocabulary[CATEGORIES[2]])} destinations")


if __name__ == "__main__":
    main()
