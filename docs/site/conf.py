"""How Sphinx makes the site, in `make docs`: README.md is its first page, every page in docs/ comes by itself."""

import re
import subprocess

import pypandoc
from docutils import nodes

project = html_title = "momentum_fix"
root_doc = "README"
include_patterns = ["*.md", "docs/**", "notebooks/**"]
exclude_patterns = [".*", "build", "dist"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_math_renderer = "mathml"
html_copy_source = html_show_copyright = html_use_index = html_domain_indices = False
myst_enable_extensions = ["dollarmath"]
myst_disable_syntax = ["myst_line_comment"]  # a line may begin with a percent sign
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is stored as it was run
autodoc_class_signature = "separated"  # and __init__ left out: users make none of these objects themselves
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "__init__"}
add_module_names = False
default_role = "py:obj"  # `name` in a docstring: a link if something has that name, else code

CONTENTS = """
```{toctree}
:hidden:
:glob:
docs/*
paper
notebooks/*
docs/site/*
*
```
"""


def setup(app):
    app.add_html_math_renderer("mathml", (None, None), (None, None))  # `formulas` leaves nothing for it
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("doctree-resolved", formulas)


def pandoc(text, *options):
    """Convert with pandoc, which fails if a citation is missing or a formula cannot be set."""
    command = [pypandoc.get_pandoc_path(), "--fail-if-warnings", *options]
    return subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def read(app, name, source):
    """Put the pages below the README, in its order, and make what Sphinx reads of the paper, which is for pandoc."""
    if name == "README":
        by_task = re.findall(r"\]\((docs/\w+)\.md\)", source[0].partition("\n## By task")[2])
        source[0] += CONTENTS.replace("docs/*", "\n".join([*dict.fromkeys(by_task), "docs/*"]))
    if name == "paper":
        resources = f"--resource-path={app.srcdir}"
        page = pandoc(source[0], "--to=rst", "--standalone", "--citeproc", "--strip-comments", "--wrap=none", resources)
        page = page.replace("\n   name: ", "\n   :name: ")  # of a figure: pandoc 3.9 forgets the first colon
        page = re.sub(r"(<[\w./-]+)\.(?:md|ipynb)>`__", r"\1.html>`__", page)  # links to other pages
        source[0] = f"````{{eval-rst}}\n{page}\n````\n"


def mark_code(app, what, name, thing, options, lines):
    """Make an indented paragraph of a docstring a block of code."""
    lines[:] = re.sub(r"(?<=[^:]\n\n)(?=    )", "::\n\n", "\n".join(lines)).split("\n")


def formulas(app, page, name):
    """Set all formulas of a page as MathML, which a browser draws by itself."""
    found = [*page.findall(lambda node: isinstance(node, (nodes.math, nodes.math_block)))]
    if found:
        marks = ["$$" if isinstance(node, nodes.math_block) else "$" for node in found]
        text = "\n\n".join(f"{mark}{node.astext().strip()}{mark}" for mark, node in zip(marks, found, strict=True))
        drawn = re.findall("<math.*?</math>", pandoc(text, "--mathml"), re.DOTALL)
        for node, formula in zip(found, drawn, strict=True):
            node.replace_self(nodes.raw("", formula, format="html"))
