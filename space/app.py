"""
A page on which anyone can ask a vision-language model before and after it learned to act.

    python space/app.py

Runs anywhere without a download: the models that ship with the package are shown unless `AEGIS_SPACE_BASE`, `_NAIVE`,
`_AEGIS` or `_HELD` name others, by folder or id on the Hub.
"""

import functools
import json
import os
import threading
from collections.abc import Callable
from typing import Any


# Before gradio is imported: the page is nobody's business but its visitors'.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# Nor does it ask others to convert the models that it is to show.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

import gradio as gr
from acting import predict
from answer_view import answer_cards
from answers import ask
from intake import picture_input, read_picture, read_text, refusal
from learning_view import learning_page
from loading import ModelUnavailableError, load
from observations import Episode, held_out_episodes, observe
from rollout_view import scene, time_curves
from settings import FOLDER, MAX_IMAGE_BYTES, MAX_WAITING, ShownModel, demonstrations, shown_models


try:
    from spaces import GPU as on_gpu  # noqa: N811 - a decorator
except ImportError:
    # Outside of Hugging Face's shared GPUs there is nothing to wait for.
    def on_gpu(function: Callable) -> Callable:
        return function


MODELS = shown_models()
POLICIES = [shown for shown in MODELS if shown.acts]
EPISODES = held_out_episodes(demonstrations())
EXAMPLES = json.loads((FOLDER / "examples" / "examples.json").read_text())
HORIZON = 50
# Of all events that run a model: one at a time, of whichever kind. Gradio's own limit is for each event.
IN_LINE = {"concurrency_id": "model", "concurrency_limit": 1}
MAX_SEED = 2**31 - 1

INTRODUCTION = """
# Does it still answer?

A vision-language model that is taught to move a robot tends to forget how to answer questions. Here the same model
answers before, and after it was fine-tuned in three ways: naively, with [AEGIS](https://arxiv.org/abs/2604.16067), and
with the directions that its answers depend on held in place.
"""
ABOUT_MODELS = """
These are the models that ship with the package: a PaliGemma 2 of 1.3 million parameters that knows coloured shapes and
nothing else, and its policies after 300 steps on 30 scripted demonstrations. They run on any CPU; one seed each.
"""


@on_gpu
def _ask_all(image: Any, question: str) -> list[tuple[ShownModel, Any]]:
    return _each(MODELS, lambda shown: ask(load(shown), image, question))


@on_gpu
def _predict_all(policies: list[ShownModel], observation: Any, instruction: str, seed: int) -> dict[ShownModel, Any]:
    return dict(_each(policies, lambda shown: _predict(shown, observation, instruction, seed)))


def _predict(shown: ShownModel, observation: Any, instruction: str, seed: int) -> Any:
    loaded = load(shown)
    try:
        return predict(loaded, observation, instruction, seed)
    except ValueError as error:
        print(f"{shown.label}: {shown.source} does not act on {observation.images[0].shape}: {error}", flush=True)
        raise ModelUnavailableError(
            f"The model “{shown.label}” was trained on other observations or actions than these."
        ) from error


def _each(models: list[ShownModel], work: Callable[[ShownModel], Any]) -> list[tuple[ShownModel, Any]]:
    """What comes of each model that can be loaded and does what is asked; the others are warned of."""
    done = []
    for shown in models:
        try:
            done.append((shown, work(shown)))
        except ModelUnavailableError as error:
            gr.Warning(str(error))
    if not done:
        raise refusal("None of the models can do this at the moment.")
    return done


def answer(file: str | None, question: str) -> str:
    """Answers of all models to a question about an image."""
    image, question = read_picture(file), read_text(question, "a question")
    return answer_cards(_ask_all(image, question), question)


def answer_example(index: int) -> tuple[str, str, str]:
    """Puts an example into the inputs and answers it."""
    example = EXAMPLES[index]
    file = str(FOLDER / "examples" / example["image"])
    image, question = read_picture(file), example["question"]
    return file, question, answer_cards(_ask_all(image, question), question, expected=example["answer"])


def choose_episode(index: int) -> tuple[Any, str, str, str]:
    """Shows the first moment of an episode, and its instruction."""
    episode = _episode(index)
    slider = gr.Slider(minimum=0, maximum=episode.length - 1, value=0)
    return slider, episode.instruction, scene(episode, observe(episode, 0, HORIZON), {}), ""


def look(index: int, step: float) -> tuple[str, str]:
    """Shows a moment of an episode, without predictions."""
    episode = _episode(index)
    return scene(episode, observe(episode, _step(episode, step), HORIZON), {}), ""


def act(index: int, step: float, instruction: str, policies: list[str], seed: float) -> tuple[str, str]:
    """Predicts a chunk of actions with each chosen policy, and draws it."""
    episode = _episode(index)
    instruction = read_text(instruction, "an instruction")
    chosen = [shown for shown in POLICIES if shown.label in (policies or ())]
    if not chosen:
        raise refusal("Please choose at least one policy.")
    if seed is None or not 0 <= seed <= MAX_SEED or seed != int(seed):
        raise refusal(f"The seed of the noise is a whole number from 0 to {MAX_SEED}.")
    observation = observe(episode, _step(episode, step), HORIZON)
    predictions = _predict_all(chosen, observation, instruction, int(seed))
    return scene(episode, observation, predictions), time_curves(observation, predictions)


# Never released: whoever comes next finds the models warm, or hears what is wrong with them when they ask.
_first_visit = threading.Lock()


def warm_up() -> None:
    """Loads the embedded models when the first visitor comes, and has them answer once; what is larger waits."""
    if _first_visit.acquire(blocking=False) and all(shown.embedded for shown in MODELS):
        answer_example(0)


def _episode(index: int | None) -> Episode:
    if index is None or not 0 <= index < len(EPISODES):
        raise refusal("Please choose a task first.")
    return EPISODES[index]


def _step(episode: Episode, step: float | None) -> int:
    # A slider that just changed hands may still say where it was.
    return min(max(int(step or 0), 0), episode.length - 1)


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Does it still answer?", delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION, elem_id="introduction")
        if all(shown.embedded for shown in MODELS):
            gr.Markdown(ABOUT_MODELS, elem_classes="note")
        with gr.Tab("Ask", id="ask"):
            _ask_tab()
        with gr.Tab("While it learned", id="learning"):
            curves = gr.HTML(elem_id="learning")
        with gr.Tab("Act", id="act"):
            _act_tab()
        page.load(functools.partial(learning_page, MODELS), None, curves, api_visibility="private")
        # Not in line: each visit would take a place there, and all but the first do nothing.
        page.load(warm_up, queue=False, show_progress="hidden", api_visibility="private")
    page.queue(default_concurrency_limit=1, max_size=MAX_WAITING)
    return page


def _ask_tab() -> None:
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            image = picture_input(
                label="Image",
                sources=["upload", "clipboard"],
                height=300,
                elem_id="image",
                placeholder="Drop an image here, or click to choose one",
            )
            question = gr.Textbox(
                label="Question",
                placeholder="what color is the shape?",
                lines=1,
                max_lines=3,
                elem_id="question",
            )
            button = gr.Button("Ask", variant="primary", elem_id="ask-button")
        with gr.Column(scale=2, min_width=300):
            answers = gr.HTML(
                '<p class="note">Choose an example below, or bring an image and a question of your own.</p>',
                elem_id="answers",
                label="Answers",
            )
    gr.Markdown("### Examples")
    gr.Markdown(
        "From easy-VQA’s test split: of each type of question, one that the naive model which ships here still "
        "answers, and one that it does not.",
        elem_classes="note",
    )
    with gr.Row(elem_id="examples"):
        for index, example in enumerate(EXAMPLES):
            choice = gr.Button(
                example["question"],
                icon=FOLDER / "examples" / example["image"],
                size="sm",
                min_width=200,
                elem_classes="example",
            )
            choice.click(
                functools.partial(answer_example, index),
                None,
                [image, question, answers],
                api_visibility="private",
                **IN_LINE,
            )
    button.click(answer, [image, question], answers, api_name="ask", **IN_LINE)
    question.submit(answer, [image, question], answers, api_visibility="private", **IN_LINE)


def _act_tab() -> None:
    first = EPISODES[0]
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            episode = gr.Dropdown(
                [(f"{each.instruction} ({each.suite})", index) for index, each in enumerate(EPISODES)],
                value=0,
                label="Task",
                info="Recorded demonstrations that no policy was trained on",
                filterable=False,
                elem_id="task",
            )
            step = gr.Slider(
                0, first.length - 1, value=0, step=1, label="Moment", info="in twentieths of a second", elem_id="step"
            )
            instruction = gr.Textbox(
                first.instruction,
                label="Instruction",
                info="What the policy is told",
                max_lines=3,
                elem_id="instruction",
            )
            policies = gr.CheckboxGroup(
                [shown.label for shown in POLICIES],
                value=[shown.label for shown in POLICIES],
                label="Policies",
                elem_id="policies",
            )
            seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed")
            button = gr.Button("Draw the chunk", variant="primary", elem_id="act-button")
        with gr.Column(scale=2, min_width=300):
            view = gr.HTML(scene(first, observe(first, 0, HORIZON), {}), elem_id="scene")
    curves = gr.HTML(elem_id="curves")
    episode.change(choose_episode, episode, [step, instruction, view, curves], api_visibility="private")
    step.release(look, [episode, step], [view, curves], api_visibility="private")
    button.click(act, [episode, step, instruction, policies, seed], [view, curves], api_name="act", **IN_LINE)


demo = build()

# Fonts of the visitor's own machine: nothing is fetched from elsewhere. Darker than Gradio's own where text and its
# ground would be hard to tell apart.
THEME = gr.themes.Soft(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], primary_hue="blue"
).set(
    body_background_fill="*neutral_50",
    border_color_primary="*neutral_300",
    input_border_width="1px",
    input_border_color="*neutral_400",
    input_border_color_dark="*neutral_500",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    block_label_text_color="*primary_700",
    block_title_text_color="*primary_700",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
)

LAUNCH = {
    "css_paths": FOLDER / "style.css",
    "theme": THEME,
    "max_file_size": MAX_IMAGE_BYTES,
    # Of what others do here.
    "enable_monitoring": False,
    "allowed_paths": [str(FOLDER / "examples")],
    "ssr_mode": False,
    "share": False,
    "footer_links": ["api"],
}

if __name__ == "__main__":
    demo.launch(**LAUNCH)
