"""How Sphinx makes the site, in `make docs`: README.md is its first page, every page in docs/ comes by itself."""

import re
import subprocess
from pathlib import Path

import matplotlib
import pypandoc
from docutils import nodes
from fontTools.ttLib import TTFont

project = html_title = "momentum_fix"
root_doc = "README"
include_patterns = ["*.md", "docs/**", "notebooks/**"]
exclude_patterns = [".*", "build", "dist"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_math_renderer = "mathml"
html_css_files = ["site.css"]
html_static_path = ["static"]
html_copy_source = html_show_copyright = html_use_index = html_domain_indices = False
myst_enable_extensions = ["dollarmath"]
myst_disable_syntax = ["myst_line_comment"]  # a line may begin with a percent sign
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook is stored as it was run
autodoc_class_signature = "separated"  # and __init__ left out: users make none of these objects themselves
autodoc_default_options = {"members": True, "member-order": "bysource", "exclude-members": "__init__"}
add_module_names = False
default_role = "py:obj"  # `name` in a docstring: a link if something has that name, else code

GROUPS = {  # of the contents. The other pages in docs/ are put under "Use", those first that README lists by task
    "Start": ["docs/diagnose", "docs/study"],
    "Use": [],
    "Understand": ["docs/site/play", "paper", "notebooks/*", "docs/conformance", "docs/zoo", "docs/benchmarks"],
    "Reference": [
        "docs/site/reference",
        "docs/site/reference_statistics",
        "docs/site/reference_*",
        "docs/limits",
        "docs/states",
        "docs/versions",
        "*",
    ],
}
SCRIPTS = {  # how high and low they stand, in parts of the font's size: near TeX's for Computer Modern
    "SuperscriptShiftUp": 0.36,
    "SuperscriptShiftUpCramped": 0.29,
    "SuperscriptBottomMin": 0.11,
    "SuperscriptBaselineDropMax": 0.39,
    "SuperscriptBottomMaxWithSubscript": 0.34,
    "SubscriptShiftDown": 0.2,
    "SubscriptTopMax": 0.34,
    "SubscriptBaselineDropMin": 0.05,
    "SubSuperscriptGapMin": 0.16,
}
TOCTREE = "\n```{{toctree}}\n:hidden:\n:caption: {}\n{}\n```\n"


def setup(app):
    app.add_html_math_renderer("mathml", (None, None), (None, None))  # `formulas` leaves nothing for it
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("doctree-resolved", formulas)
    app.connect("html-page-context", fold)
    app.connect("build-finished", font)


def pandoc(text, *options):
    """Convert with pandoc, which fails if a citation is missing or a formula cannot be set."""
    command = [pypandoc.get_pandoc_path(), "--fail-if-warnings", *options]
    return subprocess.run(command, input=text, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def read(app, name, source):
    """Put the pages below the README, in groups, and make what Sphinx reads of the paper, which is for pandoc."""
    if name == "README":
        by_task = re.findall(r"\]\((docs/\w+)\.md\)", source[0].partition("\n## By task")[2])
        source[0] += contents([*by_task, *sorted(app.env.found_docs)])
    if name == "paper":
        resources = f"--resource-path={app.srcdir}"
        page = pandoc(source[0], "--to=rst", "--standalone", "--citeproc", "--strip-comments", "--wrap=none", resources)
        page = page.replace("\n   name: ", "\n   :name: ")  # of a figure: pandoc 3.9 forgets the first colon
        page = re.sub(r"(<[\w./-]+)\.(?:md|ipynb)>`__", r"\1.html>`__", page)  # links to other pages
        source[0] = f"````{{eval-rst}}\n{page}\n````\n"


def contents(pages):
    """Give the pages as a list of contents for each group; a page stands in the first group that names it."""
    groups, left = {}, [page for page in dict.fromkeys(pages) if page != "README"]
    for caption, patterns in GROUPS.items():
        named = [[page for page in left if re.fullmatch(pattern.replace("*", r"[^/]*"), page)] for pattern in patterns]
        groups[caption] = list(dict.fromkeys(page for group in named for page in group))
        left = [page for page in left if page not in groups[caption]]
    groups["Use"] = left
    return "".join(TOCTREE.format(caption, "\n".join(group)) for caption, group in groups.items() if group)


def fold(app, name, template, context, tree):
    """Mark the sentences in what a program prints, so that a phone folds them: lines without columns."""

    def marked(block):
        return re.sub(r"^(?=.{50})((?:(?!  ).)+)$", r'<span class="sentence">\1</span>', block[0], flags=re.MULTILINE)

    if "body" in context:
        printed = r'(?<=<div class="highlight-text notranslate"><div class="highlight"><pre><span></span>).*?(?=</pre>)'
        context["body"] = re.sub(printed, marked, context["body"], flags=re.DOTALL)


def font(app, error):
    """Ship the font of the formulas: Matplotlib's DejaVu Serif, in which the places of scripts are all left at 0."""
    if error is None:
        drawn = TTFont(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSerif.ttf"))
        for name, height in SCRIPTS.items():
            getattr(drawn["MATH"].table.MathConstants, name).Value = round(height * drawn["head"].unitsPerEm)
        drawn.flavor = "woff"
        drawn.save(Path(app.outdir, "_static", "formulas.woff"))


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
