"""A model that leaves early, behind a server that batches: `pip install mosec`, `python examples/serving.py`.

The model is trained, converted, calibrated and exported; mosec collects single requests into batches; onnxruntime
routes each sample of a batch. The server's process needs onnxruntime and mosec, neither torch nor dyncompile.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from mosec import Server, ValidationError, Worker

SECONDS = 120
"""After which the server ends by itself, should the one who started it be gone."""


class Classifier(Worker):  # type: ignore[misc]
    """Runs an exported file on the requests that mosec has collected."""

    def __init__(self) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.batches = 0

    def deserialize(self, data: bytes) -> Any:
        """An image, of the bytes of its float32 values."""
        shape = self.input.shape[1:]
        if len(data) != 4 * np.prod(shape):
            raise ValidationError(f"{len(data)} bytes are not {shape} numbers of four bytes")
        return np.frombuffer(data, np.float32).reshape(shape)

    def forward(self, images: list[Any]) -> list[Any]:
        """An answer for each image: logits, exit, and of which batch it was a part."""
        self.batches += 1
        values = self.session.run(self.outputs, {self.input.name: np.stack(images)})
        found = dict(zip(self.outputs, values, strict=True))
        # A row that has left before a decision says -1 there.
        ran = {n.removeprefix("decisions."): int((v >= 0).sum()) for n, v in found.items() if n.startswith("decisions")}
        batch = {"number": self.batches, "size": len(images), "ran": ran}
        pairs = zip(found["output"].tolist(), found["exit"].tolist(), strict=True)
        return [{"logits": logits, "exit": taken, "batch": batch} for logits, taken in pairs]


def serve() -> None:
    """What the server's process does: mosec reads its address and port from the command line."""
    watch = threading.Timer(SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
    watch.daemon = True
    watch.start()
    server = Server()
    server.append_worker(Classifier, num=1, max_batch_size=32, max_wait_time=20)
    server.run()


@contextlib.contextmanager
def running(model: Path) -> Iterator[str]:
    """A server of a file, on a free port of this machine alone; ended in any case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--address", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    # A group of its own, so that no worker outlives a server that does not end when asked.
    process = subprocess.Popen(command, env={**os.environ, "MODEL": str(model)}, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Until the worker has loaded the model."""
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise TimeoutError("the server is not ready after 30 s")


def ask(url: str, image: np.ndarray) -> dict[str, Any]:
    """The answer to one request."""
    with urllib.request.urlopen(f"{url}/inference", data=image.tobytes(), timeout=30) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer


def main() -> None:
    import torch
    from torch.nn import functional as F

    import dyncompile as dc
    from dyncompile.data import as_loader
    from dyncompile.demo.datasets import digits
    from dyncompile.demo.models import ResNet

    torch.manual_seed(0)
    data = digits()  # ships with scikit-learn
    x, y = (t[:300] for t in data.test.tensors)
    model = ResNet(8, width=8, in_channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(8):  # the static model, as you have it
        for images, labels in as_loader(data.train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    dyn = dc.dynamize(model, "early_exit", exits=2, example_inputs=x[:2])
    dc.finetune(dyn, data.train, epochs=4, lr=5e-3, progress=False)
    cal = dc.calibrate(dyn, data.calibration, max_drop=0.05)
    dyn.eval()

    with tempfile.TemporaryDirectory() as folder:
        path = dc.export(dyn, Path(folder) / "digits.onnx", decisions=True, calibration=cal)
        with running(path) as url, ThreadPoolExecutor(32) as clients:
            answers = list(clients.map(lambda image: ask(url, image), x.numpy()))

    with torch.no_grad():
        trace = dyn.trace(x)
    logits = torch.tensor([answer["logits"] for answer in answers])
    torch.testing.assert_close(logits, trace.output, rtol=1e-3, atol=1e-4)
    left = torch.stack([*trace.decisions.values(), torch.ones(len(x), dtype=torch.bool)]).int().argmax(0)
    assert [answer["exit"] for answer in answers] == left.tolist()

    batches = {answer["batch"]["number"]: answer["batch"] for answer in answers}.values()
    assert sum(batch["size"] for batch in batches) == len(x)
    assert max(batch["size"] for batch in batches) > 1, "nothing was batched"
    print(f"{len(x)} requests in {len(batches)} batches, the largest of {max(b['size'] for b in batches)}")
    print(f"accuracy {(logits.argmax(1) == y).float().mean().item():.3f} at {trace.cost.mean().item():.2f} of the cost")
    for number, name in enumerate(dyn.exits):
        if dyn.exits[name].enabled:  # calibration disables what does not pay
            came = sum(batch["ran"][name] for batch in batches)
            assert came == sum(answer["exit"] >= number for answer in answers)
            print(f"the region up to {name} ran {came} rows")
    print(f"the region behind the last exit ran {sum(a['exit'] == len(dyn.exits) for a in answers)} rows")


if __name__ == "__main__":
    serve() if "MODEL" in os.environ else main()
