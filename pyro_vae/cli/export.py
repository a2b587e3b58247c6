"""The command that exports a run."""

from pathlib import Path

from pyro_vae.cli.app import RunFolder, UserClass, app
from pyro_vae.cli.run import binarize_of, open_run, test_part


@app.command
def export(
    run: RunFolder,
    *,
    out: Path | None = None,
    formats: tuple[str, ...] = ("onnx", "torch"),
    model: UserClass = None,
) -> None:
    """Write encoder and decoder as files that need neither Pyro nor this library.

    The encoder gives the parameters of q(z|x), the decoder the parameters of p(x|z).

    Parameters
    ----------
    out
        Folder for the files; by default RUN/export.
    formats
        onnx, torch (a .pt2 file for torch.export.load), or both.
    """
    from pyro_vae.inference import exporting

    pair, loaded, given = open_run(run, model=model)
    x, context = test_part(loaded, given, 32)
    folder = out or run / "export"
    for path in exporting.export(
        pair, x, *context, folder=folder, formats=formats, binarize=binarize_of(given)
    ):
        print(path)
