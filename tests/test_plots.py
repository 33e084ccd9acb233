"""The curves: their data without Matplotlib, and what is drawn of it."""

import random
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from momentum_fix import corrected_momentum, plots
from momentum_fix.weights import batch_weights


def drawn(ax):
    """The curves on the axes by label."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}


def as_drawn(curves):
    return {label: (pytest.approx(xs), pytest.approx(ys)) for label, (xs, ys) in curves.items()}


PLOTS = {
    plots.decay: lambda: plots.decay_data(batches=31),
    plots.cumulative: lambda: plots.cumulative_data(batches=30),
    plots.effective: plots.effective_data,
    plots.shares: plots.shares_data,
    plots.signal: plots.signal_data,
}
each_plot = pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.__name__)


def test_the_weight_of_a_batch_decays_by_one_minus_m_per_batch_and_pass():
    data = plots.decay_data(0.1, (2, 5), batches=10)
    assert list(data) == ["1 pass", "2 passes", "5 passes", "5 passes, corrected"]
    for label, passes in (("1 pass", 1), ("2 passes", 2), ("5 passes", 5)):
        ages, weights = data[label]
        assert ages == list(range(10))
        assert weights == pytest.approx([(1 - 0.9**passes) * 0.9 ** (passes * age) for age in ages], rel=1e-12)


@pytest.mark.parametrize("data", [plots.decay_data, plots.cumulative_data, lambda m, p: plots.signal_data(m, p[-1])])
def test_the_corrected_curve_lies_on_that_of_one_pass_and_the_uncorrected_do_not(data):
    curves = data(0.1, (2, 3, 5))
    plain, corrected = curves["1 pass"], curves["5 passes, corrected"]
    assert corrected[0] == plain[0]
    assert corrected[1] == pytest.approx(plain[1], rel=1e-9, abs=1e-12)
    assert curves["5 passes"][1] != pytest.approx(plain[1], rel=1e-2)


def test_the_cumulative_weight_is_what_the_older_batches_leave():
    for label, passes in (("1 pass", 1), ("3 passes", 3)):
        counts, weights = plots.cumulative_data(0.1, (3,), batches=8)[label]
        assert counts == list(range(1, 9))
        assert weights == pytest.approx([1 - 0.9 ** (passes * count) for count in counts], rel=1e-12)


def test_effective_momentum_runs_from_0_to_1_above_the_diagonal():
    data = plots.effective_data((1, 4), points=21)
    momenta, effective = data["4 passes"]
    assert momenta == data["1 pass"][0] == data["1 pass"][1]
    assert (momenta[0], momenta[-1], effective[0], effective[-1]) == (0, 1, 0, 1)
    assert effective == pytest.approx([1 - (1 - momentum) ** 4 for momentum in momenta], rel=1e-12)
    assert data["momentum 0.1"] == ([0.1, 0.1], [0.1, pytest.approx(1 - 0.9**4, rel=1e-12)])


def test_the_shares_are_those_of_the_order_theorem():
    data = plots.shares_data(0.1, batches=5)
    used = corrected_momentum(0.1, 2)
    numbers, weights = data["one after the other"]
    assert numbers == [1, 2, 3, 4, 5]
    assert weights == pytest.approx([0.1 * 0.9 ** (5 - number) for number in numbers], rel=1e-12)
    expected = list(batch_weights([1, 2, 3, 4, 5, 5, 4, 3, 2, 1], used).batches.values())
    assert data["forward, then in reverse"][1] == pytest.approx(expected, rel=1e-12)
    again = list(batch_weights([1, 2, 3, 4, 5] * 2, used).batches.values())
    assert data["forward, then again"][1] == pytest.approx(again, rel=1e-12)
    assert sum(weights) == pytest.approx(sum(expected), rel=1e-12) == pytest.approx(sum(again), rel=1e-12)


def test_the_signal_shows_more_noise_and_less_lag_without_correction():
    data = plots.signal_data(0.1, 5, batches=40_000)
    half, (_, truth) = 20_000, data["true mean"]
    noise, lag = {}, {}
    for label in ("1 pass", "5 passes"):
        values = data[label][1]
        noise[label] = sum(value**2 for value in values[100:half]) / (half - 100)
        lag[label] = sum(true - value for true, value in zip(truth[30_000:], values[30_000:], strict=True)) / 10_000
    assert noise["5 passes"] / noise["1 pass"] == pytest.approx(4.89, rel=0.15)  # about 1,000 independent values
    assert lag["1 pass"] == pytest.approx(0.1 * 9, abs=0.1)
    assert lag["5 passes"] == pytest.approx(0.1 * 1.44, abs=0.1)


def test_a_signal_is_the_same_for_the_same_seed_only():
    assert plots.signal_data(seed=3) == plots.signal_data(seed=3) != plots.signal_data(seed=4)


def test_a_signal_rests_drifts_and_is_averaged_from_zero_on():
    data = plots.signal_data(0.5, 2, batches=100)
    numbers, means = data["batch mean"]
    truth = data["true mean"][1]
    assert numbers == list(range(1, 101))
    assert truth == pytest.approx([0.0] * 50 + [0.1 * step for step in range(1, 51)])
    noise = [mean - true for mean, true in zip(means, truth, strict=True)]
    generator = random.Random(0)
    assert noise == pytest.approx([generator.gauss(0, 1) for _ in numbers])
    assert data["1 pass"][1][:2] == pytest.approx([means[0] / 2, means[0] / 4 + means[1] / 2])


def test_a_plot_draws_what_it_is_asked_for():
    for plot, data, asked in (
        (plots.decay, plots.decay_data, (0.3, (4,), 7)),
        (plots.cumulative, plots.cumulative_data, (0.3, (4,), 7)),
        (plots.shares, plots.shares_data, (0.3, 4)),
        (plots.signal, plots.signal_data, (0.3, 2, 20, 5)),
    ):
        assert drawn(plot(*asked)) == as_drawn(data(*asked))
        assert "0.3" in plot(*asked).get_legend().get_title().get_text()
    assert drawn(plots.effective((1, 7), momentum=0.3)) == as_drawn(plots.effective_data((1, 7), momentum=0.3))


@each_plot
def test_a_plot_draws_its_data(plot):
    assert drawn(plot()) == as_drawn(PLOTS[plot]())


@each_plot
def test_a_plot_says_what_is_seen_labels_its_axes_and_names_every_curve(plot):
    ax = plot()
    assert len(ax.get_title()) > 20
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(drawn(ax))
    title = ax.get_legend().get_title().get_text()
    assert "0.1" in title or (plot is plots.effective and title)  # that one marks it
    assert ax.get_ylabel()
    assert ("momentum" if plot is plots.effective else "(batches)") in ax.get_xlabel()
    assert not ax.spines["top"].get_visible()
    assert not ax.texts  # nothing placed by hand


@each_plot
def test_the_largest_value_of_every_curve_is_seen_and_the_axes_show_little_else(plot):
    ax = plot()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    for xs, ys in drawn(ax).values():
        assert bottom < max(ys) <= top
        assert left <= min(xs) <= max(xs) <= right
    largest = max(max(ys) for _, ys in drawn(ax).values())
    assert top <= largest * (1.5 if plot is plots.decay else 1.1)
    scale, least = {plots.decay: ("log", 1e-3), plots.signal: ("linear", bottom)}.get(plot, ("linear", 0))
    assert (ax.get_yscale(), bottom) == (scale, least)


@pytest.mark.parametrize(
    ("momentum", "passes"), [(0.0005, (2, 3)), (0.001, 2), (0.01, 5), (0.3, 2), (0.5, 5), (0.9, 2), (1.0, 2), (0.1, 12)]
)
def test_the_newest_batch_of_every_run_is_seen_whatever_the_momentum(momentum, passes):
    ax = plots.decay(momentum, passes)
    bottom, top = ax.get_ylim()
    assert all(bottom <= ys[0] / 10 and ys[0] < top for _, ys in drawn(ax).values())


def test_numbers_of_passes_look_different():
    looks = {str(sorted(plots._style(plots._count(k)).items())) for k in range(1, 26)}
    assert len(looks) == 25


@pytest.mark.parametrize("plot", [plots.decay, plots.cumulative, plots.signal])
def test_passes_are_one_number_of_any_kind_or_several(plot):
    assert (
        list(drawn(plot(passes=np.int64(3)))) == list(drawn(plot(passes=np.array([3])))) == list(drawn(plot(passes=3)))
    )
    with pytest.raises(ValueError, match=r"passes is \[\], but must be a number of passes or several"):
        plot(passes=[])


def test_each_number_of_passes_has_one_colour_and_line_on_all_plots_and_a_band_lies_under_its_line():
    several = plots.decay(passes=(2, 3, 5)), plots.cumulative(passes=(5, 3, 2)), plots.signal(passes=(2, 3, 5))
    for curves in (*several, plots.effective((1, 2, 3, 5))):
        lines = {line.get_label(): line for line in curves.lines}
        for k, look in ((1, ("#000000", "-")), (2, ("#0072B2", "--")), (3, ("#D55E00", "-.")), (5, ("#CC79A7", ":"))):
            line = lines["1 pass" if k == 1 else f"{k} passes"]
            assert (line.get_color(), line.get_linestyle()) == look
        if band := lines.get("5 passes, corrected"):
            assert (band.get_color(), band.get_zorder() < lines["1 pass"].get_zorder()) == (plots.GREEN, True)
            assert band.get_linewidth() > 3 * lines["1 pass"].get_linewidth()


def test_what_is_no_run_is_drawn_otherwise():
    lines = {line.get_label(): line for line in [*plots.signal().lines, *plots.effective().lines]}
    styles = {name: (lines[name].get_linestyle(), lines[name].get_marker()) for name in lines}
    assert styles["batch mean"] == styles["momentum 0.1"] == ("None", "o")
    assert styles["true mean"] == styles["1 pass"] == ("-", "None")
    assert lines["true mean"].get_linewidth() < lines["1 pass"].get_linewidth()
    assert {line.get_marker() for line in plots.shares().lines} == {"o", "^", "s"}


@each_plot
def test_green_is_what_is_corrected_and_nothing_else(plot):
    for line in plot().lines:
        red, green, blue = to_rgb(line.get_color())
        corrected = line.get_label().endswith("corrected") or plot is plots.shares  # where all runs are
        assert (green > max(red, blue)) == corrected
        assert line.get_color() not in (plots.BY_PASSES if corrected else ())


def test_one_number_of_passes_is_as_good_as_a_list_of_one():
    for plot in (plots.decay, plots.cumulative, plots.signal):
        assert drawn(plot(passes=4)) == drawn(plot(passes=[4]))
        assert list(drawn(plot(passes=4)))[-3:] == ["1 pass", "4 passes", "4 passes, corrected"]


def test_the_figure_of_all_curves_has_the_momentum_that_it_is_given():
    for page, momentum in ((plots.figure(), "0.1"), (plots.figure(0.3), "0.3")):
        titles = [ax.get_legend().get_title().get_text() for ax in page.axes]
        assert [momentum in title for title in titles] == [True, True, False, True, True]


@each_plot
def test_a_plot_goes_where_it_is_told_and_else_on_a_figure_of_its_own(plot):
    ax = Figure().subplots()
    assert plot(ax=ax) is ax
    assert ax.lines
    assert plot().figure is not plot().figure


def assert_legible(page):
    """No point drawn under a legend, no legend outside its axes, no title wider than them allows."""
    page.draw_without_rendering()
    for ax in page.axes:
        box, title, legend = ax.get_window_extent(), ax.title.get_window_extent(), ax.get_legend().get_window_extent()
        assert page.bbox.x0 <= title.x0
        assert title.width <= 1.1 * box.width
        assert box.x0 <= legend.x0 < legend.x1 <= box.x1
        assert box.y0 <= legend.y0 < legend.y1 <= box.y1
        for line in ax.lines:
            assert not any(legend.contains(*point) for point in ax.transData.transform(line.get_xydata()))


def contrast_with_white(colour):
    """The contrast of the WCAG, 1 to 21; 3 is asked of lines, 4.5 of small text."""
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 1.05 / (sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True)) + 0.05)


@each_plot
def test_lines_and_texts_stand_out_from_the_white(plot):
    ax = plot()
    assert all(contrast_with_white(line.get_color()) >= 3 for line in ax.lines)
    assert all(contrast_with_white(text.get_color()) >= 4.5 for text in ax.get_legend().get_texts())
    assert contrast_with_white("#E69F00") < 3 < contrast_with_white("#CC79A7") < 4.5


@each_plot
def test_the_legend_lies_inside_the_axes_and_on_nothing(plot):
    assert_legible(plot().figure)


def test_the_figure_of_all_curves_is_as_legible():
    page = plots.figure()
    assert len(page.axes) == 5
    assert_legible(page)


@pytest.mark.parametrize("curves", [plots.decay, plots.cumulative, plots.effective, plots.shares])
def test_curves_have_different_colours(curves):
    colours = [line.get_color() for line in curves().lines if line.get_linestyle() != "None"]
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_save_writes_the_kind_that_the_name_says(tmp_path, name, start):
    plots.save(tmp_path / name, plots.effective().figure)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_the_same_curves_give_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        plots.save(tmp_path / name, plots.shares().figure)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("name", ["curves.gif", "curves"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}', but its name must end in \.png, \.svg or \.pdf"):
        plots.save(tmp_path / name)


def test_the_module_and_the_data_load_no_matplotlib_and_the_plots_load_no_pyplot():
    program = (
        "import sys; from momentum_fix import plots; plots.decay_data(); plots.signal_data();"
        "assert 'matplotlib' not in sys.modules; plots.decay(); assert 'matplotlib' in sys.modules;"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
