"""Every signature with shapes is checked on every call; one thread, so that runs are quick and alike."""

from jaxtyping import install_import_hook

# The modules whose signatures carry shapes; `generate` answers a wrong one with an error of its own.
CHECKED = (
    "attention", "context", "data", "ffn", "hybrid", "model", "moe", "norm", "position", "residual", "ssm", "train",
)  # fmt: skip
hook = install_import_hook([f"llmlib.{module}" for module in CHECKED], "typechecked.check")

import pytest  # noqa: E402 (the hook must come before the first import of llmlib)
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items) -> None:
    """GPU tests are skipped where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
