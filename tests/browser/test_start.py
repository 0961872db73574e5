"""The form that starts a run, and running again."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.async_api import Locator, Page, expect

from promptlayer_exec.simulator import Fault, Scenario, SimNode, Simulator

pytestmark = pytest.mark.asyncio(loop_scope="session")

DONE = Scenario([SimNode("answer", "Otters are fine.", is_output_node=True)])
BIG = 9007199254740993


def start_button(page: Page) -> Locator:
    """Return the button of the form."""
    return page.get_by_role("button", name="Start", exact=True)


async def choose(ui: Any, page: Page, workflow: str) -> None:
    """Go to the form, and choose a workflow by keyboard."""
    await ui.open("#/start")
    await page.get_by_label("Workflow name or id").fill(workflow)
    await page.keyboard.press("Tab")


async def test_a_workflow_without_a_definition_takes_json(
    sim: Simulator, ui: Any, page: Page, browser_errors: Any
) -> None:
    """Errors are at their fields, and nothing is started."""
    browser_errors.expected = ("404 (Not Found)", "422 (")
    sim.add_workflow("write/report", lambda _: DONE, warning="missing input variables: tone")
    await ui.open("#/start")
    workflow, inputs = (
        page.get_by_label("Workflow name or id"),
        page.get_by_label("Inputs (a JSON object)"),
    )
    await start_button(page).click()
    await expect(page.locator("#workflow-error")).to_contain_text("Enter the name")
    await workflow.fill("nothing")
    await page.keyboard.press("Tab")
    await expect(page.locator("#definition")).to_contain_text("the server returned 404")
    await start_button(page).click()
    await expect(page.locator("#workflow-error")).to_contain_text("the server returned 404")
    await expect(workflow).to_be_focused()
    await workflow.fill("write/report")
    for wrong, reason in [
        ('{"topic": otters}', "This is not JSON: Expecting value at line 1, column 11."),
        ("[1]", "The inputs must be a JSON object"),
        ('{"a": NaN}', "inputs.a"),
    ]:
        await inputs.fill(wrong)
        await start_button(page).click()
        await expect(page.locator("#inputs-error")).to_contain_text(reason)
        await expect(inputs).to_be_focused()
    assert sim.runs == []
    await inputs.fill(f'{{"topic": "otters", "n": {BIG}}}')
    await start_button(page).click()
    await expect(page.get_by_role("heading", name="write/report")).to_be_visible()
    (run,) = sim.runs
    assert run.inputs == {"topic": "otters", "n": BIG}
    assert page.url.endswith(f"#/executions/{run.execution_id}")
    await expect(ui.part("warning")).to_contain_text("missing input variables: tone")


async def test_there_is_a_field_for_each_required_input(
    sim: Simulator, ui: Any, page: Page
) -> None:
    """Each type has its field; all that is missing or wrong is said before sending."""
    types = {"topic": "string", "depth": "number", "deep": "boolean"}
    sim.add_workflow("report", DONE, inputs=types)
    sim.add_workflow("other", DONE)
    await choose(ui, page, "report")
    topic, depth = page.get_by_label("topic"), page.get_by_label("depth (number)")
    await expect(topic).to_be_visible()
    options = page.locator("#workflows option")
    await expect(options).to_have_count(2)
    names = await options.evaluate_all("(all) => all.map((one) => one.value).sort()")
    assert names == ["other", "report"]
    await start_button(page).click()
    for index, name in enumerate(types):
        error = page.locator(f"#field-{index}-error")
        await expect(error).to_contain_text(f"requires {name}")
    await expect(topic).to_be_focused()
    await topic.fill('say "hi"\nto otters')
    await page.get_by_label("deep (boolean)").select_option("true")
    await depth.fill("deep")
    await start_button(page).click()
    await expect(page.locator("#field-1-error")).to_contain_text("Enter a ")
    await depth.fill(str(BIG))
    await page.get_by_label("More inputs (a JSON object)").fill('{"tone": "warm"}')
    assert sim.runs == []
    await start_button(page).click()
    await expect(page.get_by_role("heading", name="report")).to_be_visible()
    (run,) = sim.runs
    assert run.inputs == {
        "topic": 'say "hi"\nto otters',
        "depth": BIG,
        "deep": True,
        "tone": "warm",
    }


async def test_start_stays_in_sight(sim: Simulator, ui: Any, page: Page) -> None:
    """It does not scroll away, however many inputs there are."""
    names = [f"input {number}" for number in range(12)]
    sim.add_workflow("long", DONE, inputs=dict.fromkeys(names, "string"))
    await choose(ui, page, "long")
    last = page.get_by_label("input 11")
    await expect(last).not_to_be_in_viewport()
    await expect(start_button(page)).to_be_in_viewport(ratio=1)
    await last.focus()
    button, field = [await one.bounding_box() for one in (start_button(page), last)]
    assert button is not None
    assert field is not None
    assert field["y"] + field["height"] <= button["y"]


async def test_a_label_or_a_version_can_be_chosen(sim: Simulator, ui: Any, page: Page) -> None:
    """The fields are those of that version; what was entered for these is kept."""
    sim.add_workflow("report", DONE, inputs={"topic": "string"}, labels=["prod"])
    sim.add_version("report", DONE, inputs={"topic": "string", "tone": "string"})
    await choose(ui, page, "report")
    release = page.get_by_label("Version")
    versions = ["Latest version (2)", "Label prod", "Version 2", "Version 1"]
    await expect(release.locator("option")).to_have_text(versions)
    await page.get_by_label("topic").fill("otters")
    await page.get_by_label("tone").fill("warm")
    await release.select_option("label:prod")
    await expect(page.get_by_label("tone")).to_have_count(0)
    await expect(page.get_by_label("topic")).to_have_value("otters")
    await expect(page.locator("#dropped")).to_contain_text("report does not ask for it: tone.")
    await page.get_by_label("Metadata").fill("team = otters=a\n\nnight=1 ")
    await start_button(page).click()
    await expect(ui.part("subtitle")).to_contain_text("label prod")
    assert sim.runs[0].body["workflow_label_name"] == "prod"
    assert sim.runs[0].inputs == {"topic": "otters"}
    assert sim.runs[0].body["metadata"] == {"team": "otters=a", "night": "1"}


async def test_another_workflow_gets_no_inputs_that_it_does_not_ask_for(
    sim: Simulator, ui: Any, page: Page
) -> None:
    """The form says what it left out; what could not be read as JSON stays, and is an error."""
    sim.add_workflow("report", DONE, inputs={"topic": "string", "depth": "number"})
    sim.add_workflow("grade", DONE, inputs={"depth": "number", "strict": "boolean"})
    more = page.get_by_label("More inputs (a JSON object)")
    await choose(ui, page, "report")
    await page.get_by_label("topic").fill("otters")
    await page.get_by_label("depth").fill("deep")
    await more.fill('{"tone": "warm", "strict": true}')
    await page.get_by_label("Workflow name or id").fill("grade")
    await page.keyboard.press("Tab")
    await expect(page.get_by_label("strict")).to_have_value("true")
    await expect(page.locator("#dropped")).to_contain_text(
        "grade does not ask for it: topic, tone."
    )
    await expect(more).to_have_value("{}")
    await start_button(page).click()
    await expect(page.locator("#field-0-error")).to_contain_text("Enter a ")
    await page.get_by_label("depth").fill("2")
    await more.fill("{")
    await start_button(page).click()
    await expect(page.locator("#inputs-error")).to_contain_text("This is not JSON")
    await more.fill("")
    await page.get_by_label("Metadata").fill("no value")
    await start_button(page).click()
    await expect(page.locator("#metadata-error")).to_contain_text("not name=value: no value")
    assert sim.runs == []
    await page.get_by_label("Metadata").fill("")
    await start_button(page).click()
    await expect(page.get_by_role("heading", name="grade")).to_be_visible()
    assert sim.runs[0].inputs == {"depth": 2, "strict": True}


async def test_inputs_of_earlier_runs_can_be_chosen(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """Each different set is offered once, the newest first."""
    sim.add_workflow("report", DONE, inputs={"topic": "string"})
    for topic in ("otters", "newts", "otters"):
        await viewer.board.start("report", {"topic": topic, "n": BIG})
    await choose(ui, page, "report")
    earlier = page.get_by_label("Inputs of an earlier run")
    await expect(earlier.locator("option")).to_have_text(
        ["Choose a run", re.compile("otters"), re.compile("newts")]
    )
    await earlier.select_option(index=2)
    await expect(page.get_by_label("topic")).to_have_value("newts")
    await expect(page.get_by_label("More inputs")).to_have_value(f'{{\n  "n": {BIG}\n}}')


async def test_a_run_is_started_again_behind_a_question(
    sim: Simulator, viewer: Any, ui: Any, page: Page
) -> None:
    """It says that it costs; the inputs are the same, or edited first."""
    sim.add_workflow("report", DONE, inputs={"topic": "string"}, labels=["prod"])
    first = await viewer.board.start("report", {"topic": "otters"}, label="prod")
    await ui.open_run(first.id)
    again = page.get_by_role("button", name="Run again")
    dialog = page.get_by_role("dialog")
    await again.click()
    await expect(dialog).to_contain_text("It costs what a run of this workflow costs")
    await expect(dialog.locator("pre")).to_have_text('{\n  "topic": "otters"\n}')
    await expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(dialog).to_be_hidden()
    assert len(sim.runs) == 1
    await again.click()
    await dialog.get_by_role("button", name="Start a new run").click()
    await expect(ui.part("crumb")).to_have_text(f"Execution {first.id + 1}")
    await page.get_by_role("button", name="Run again").click()
    await dialog.get_by_role("button", name="Edit the inputs first").click()
    topic = page.get_by_label("topic")
    await expect(topic).to_have_value("otters")
    await expect(page.get_by_label("Version")).to_have_value("label:prod")
    await topic.fill("newts")
    await start_button(page).click()
    await expect(dialog).to_contain_text('{"topic": "newts"}')
    await dialog.get_by_role("button", name="Start a new run").click()
    await expect(ui.part("crumb")).to_have_text(f"Execution {first.id + 2}")
    assert [run.inputs["topic"] for run in sim.runs] == ["otters", "otters", "newts"]
    assert {run.body["workflow_label_name"] for run in sim.runs} == {"prod"}


async def test_an_unknown_start_is_shown_as_what_it_is(
    sim: Simulator, ui: Any, page: Page, browser_errors: Any
) -> None:
    """On the form, and in the history, where it can be found later."""
    browser_errors.expected = ("502 (Bad Gateway)",)
    sim.add_workflow("report", DONE)
    await choose(ui, page, "report")
    await expect(page.locator("#definition")).to_have_text("It has no required inputs.")
    sim.inject(Fault.disconnect(), path="/run")
    await start_button(page).click()
    unknown = page.locator("#unknown-start")
    await expect(unknown).to_contain_text("This run may have started")
    await expect(unknown).to_contain_text("or you may pay twice")
    await ui.open("#/history?outcome=unknown")
    line = page.locator(".entry")
    await expect(line).to_contain_text("Unknown whether it started")
    await expect(line).to_contain_text("report")
    assert len(sim.runs) == 1
