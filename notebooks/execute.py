"""Run the notebooks and store what they print and draw: `python notebooks/execute.py`.

Run again with nothing changed, it stores the same bytes: without times, and with drawings that have fixed names.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent

if __name__ == "__main__":
    with tempfile.NamedTemporaryFile("w", suffix="matplotlibrc") as settings:
        settings.write("svg.hashsalt: momentum_fix\n")
        settings.flush()
        os.environ |= {"MATPLOTLIBRC": settings.name, "SOURCE_DATE_EPOCH": "0"}
        for path in sorted(HERE.glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            metadata = notebook.metadata.copy()
            NotebookClient(
                notebook, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(HERE.parent)}}
            ).execute()
            notebook.metadata = metadata  # without the version of the Python that ran it
            nbformat.write(notebook, path)
            print(f"notebooks/{path.name} is up to date")
