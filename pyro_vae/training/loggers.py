"""Loggers of the history, for ``on_epoch=[...]`` of `pyro_vae.fit`."""

from pathlib import Path
from types import TracebackType
from typing import Any

from pyro_vae.errors import UsageError
from pyro_vae.training.history import Epoch
from pyro_vae.training.stopping import summary_writer


class _Logger:
    """A function of an epoch that is closed at the end of a ``with`` block."""

    def __call__(self, epoch: Epoch) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left, and end."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


class TensorBoard(_Logger):
    """Write the history for TensorBoard, as ``tensorboard=True`` does into the run folder.

    Arguments:
        folder: the folder of the events.

    Raises `UsageError` if TensorBoard is not installed.

    >>> import tempfile, torch, pyro_vae as pv
    >>> vae, x = pv.VAE.mlp((4,)), torch.ones(8, 4)
    >>> with tempfile.TemporaryDirectory() as folder, TensorBoard(folder) as board:
    ...     _ = pv.fit(vae, x, epochs=1, progress=False, on_epoch=[board])
    """

    def __init__(self, folder: str | Path) -> None:
        self.board = summary_writer()(str(folder))

    def __call__(self, epoch: Epoch) -> None:
        for name, value in epoch.row().items():
            self.board.add_scalar(name, value, epoch.epoch)

    def close(self) -> None:
        self.board.close()


class WeightsAndBiases(_Logger):
    """Log the history with Weights & Biases.

    Arguments:
        options: the arguments of ``wandb.init``, such as ``project`` and ``mode="offline"``.

    Raises `UsageError` if wandb is not installed.
    """

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("WeightsAndBiases", "wandb") from error
        self.run = wandb.init(**options)

    def __call__(self, epoch: Epoch) -> None:
        self.run.log(epoch.row(), step=epoch.epoch)

    def close(self) -> None:
        self.run.finish()


class MLflow(_Logger):
    """Log the history with MLflow.

    Arguments:
        tracking_uri: where MLflow keeps its runs; by default what its settings say.
        options: the arguments of ``mlflow.start_run``, such as ``run_name``.

    Raises `UsageError` if MLflow is not installed.
    """

    def __init__(self, tracking_uri: str | None = None, **options: Any) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise _missing("MLflow", "mlflow") from error
        if tracking_uri is not None:
            mlflow.set_tracking_uri(tracking_uri)
        self.mlflow, self.run = mlflow, mlflow.start_run(**options)

    def __call__(self, epoch: Epoch) -> None:
        self.mlflow.log_metrics(epoch.row(), step=epoch.epoch, run_id=self.run.info.run_id)

    def close(self) -> None:
        self.mlflow.end_run()


def _missing(what: str, package: str) -> UsageError:
    return UsageError(f"{what} needs {package}, which is not installed; run pip install {package}")
