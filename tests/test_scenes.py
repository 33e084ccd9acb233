"""What diagnose says of each scene is what the uncheckpointed twin says, and what it recommends helps."""

import pytest

from momentum_fix.diagnosis.watch import ITSELF
from pages import rows
from scenes import ENGINES, SCENES, plain_state, plainly, run, same_gradients

CELLS = [(name, engine) for name, scene in SCENES.items() for engine in scene.engines]


def observed(name, ckpt):
    """Give what the twin says of gradients and state, and what the report says; the step is the same without it."""
    scene = SCENES[name]
    truth, _ = run(scene, plainly)
    unwatched, _ = run(scene, ckpt)
    net, report = run(scene, ckpt, watched=True)
    assert same_gradients(net, unwatched)
    assert plain_state(net) == plain_state(unwatched)
    return same_gradients(net, truth), plain_state(net) == plain_state(truth), report


@pytest.mark.parametrize(("name", "engine"), CELLS)
def test_the_report_says_of_a_plain_checkpoint_what_the_twin_says(name, engine):
    scene, (plain, _) = SCENES[name], ENGINES[engine]
    gradients, state, report = observed(name, plain)
    assert (gradients, state) == (scene.gradients, scene.state)
    assert report.gradients_right is gradients
    assert report.ok is (gradients and state if scene.fine is None else scene.fine)
    if not gradients:
        assert {each.remedy.startswith(scene.use) for each in report.differences} == {True}
        assert all(each.module.startswith(("body", ITSELF)) for each in report.differences)


@pytest.mark.filterwarnings("ignore:a parameter of shape")
@pytest.mark.parametrize(("name", "engine"), CELLS)
def test_the_report_says_of_a_preserving_checkpoint_what_the_twin_says_and_does_not_recommend_it_again(name, engine):
    scene, (_, preserving) = SCENES[name], ENGINES[engine]
    gradients, state, report = observed(name, preserving)
    assert gradients is (scene.gradients or scene.preserved)
    assert state or not scene.preserved
    assert report.gradients_right is gradients
    assert report.ok is (gradients and state)
    assert not any("preserve_state" in each.remedy for each in report.differences)


def test_no_wrong_gradient_is_called_right_and_there_are_scenes_of_both_kinds():
    wrong = [name for name, scene in SCENES.items() if not scene.gradients]
    assert len(wrong) > 30
    assert len(SCENES) - len(wrong) > 15


def test_the_page_about_diagnose_has_a_row_for_each_remedy_that_a_scene_asks_for_and_no_other():
    table = rows("diagnose.md", '| why the recomputation differs | "Use:" begins with |')
    said = {use.partition(" ...")[0] for _, use in table}
    asked = {scene.use for scene in SCENES.values() if not scene.gradients}
    assert {max((each for each in said if use.startswith(each)), key=len, default=use) for use in asked} == said
