// The sub-tab "Block weights": sliders that write the list, and a tag that goes into the prompt.

(function() {
    const LIST = "#prefuse-blocks-list textarea, #prefuse-blocks-list input";
    const PROMPTS = "#prefuse-generate-prompt textarea, #txt2img_prompt textarea";
    const PATIENCE = 1000; // milliseconds until a question without an answer is given up

    let asked = null; // the list that the curve is being drawn of
    let next = null; // the one that is to be asked then; those between are left out
    let since = 0;
    let serial = null; // of the sliders that were seen last

    function write(field, text) {
        const own = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), "value");
        own.set.call(field, text);
        field.dispatchEvent(new Event("input", {bubbles: true}));
    }

    // In the order of the list; in the page they are grouped.
    function sliders() {
        const knobs = [...document.querySelectorAll(".prefuse-block input[type=range]")];
        return knobs.sort((one, other) => one.dataset.prefuseItem - other.dataset.prefuseItem);
    }

    function ask(text) {
        next = text;
        if (asked === null) askNext();
    }

    function askNext() {
        [asked, next] = [next, null];
        since = performance.now();
        write(document.querySelector(LIST), asked);
        requestAnimationFrame(look);
    }

    function look() {
        const answers = [...document.querySelectorAll("[data-prefuse-answer]")];
        const answered = answers.some((one) => one.dataset.prefuseAnswer === asked);
        if (!answered && performance.now() - since < PATIENCE) return requestAnimationFrame(look);
        asked = null;
        if (next !== null) askNext();
    }

    function show(input, value) {
        if (input.type === "range") {
            input.min = Math.min(input.min, Math.floor(value));
            input.max = Math.max(input.max, Math.ceil(value));
        }
        input.value = value;
    }

    function onSlider(input) {
        const value = Number(input.value);
        if (input.value === "" || !Number.isFinite(value)) return;
        for (const other of input.parentElement.querySelectorAll("input")) {
            if (other !== input) show(other, value);
        }
        const numbers = sliders().map((one) => one.nextElementSibling.value || "0");
        const items = (next ?? document.querySelector(LIST).value).split(",");
        const all = items.length === numbers.length ? items : numbers; // letters of a list stay
        all[input.dataset.prefuseItem] = String(value);
        ask(all.join(","));
    }

    function onList(text) {
        const items = text.split(",");
        const knobs = sliders();
        if (items.length !== knobs.length || text === asked) return;
        knobs.forEach((knob, index) => {
            const value = Number(items[index]);
            if (items[index].trim() === "" || !Number.isFinite(value)) return;
            show(knob, value);
            show(knob.nextElementSibling, value);
        });
    }

    function onInput(event) {
        if (event.target.dataset && event.target.dataset.prefuseItem !== undefined) {
            event.stopPropagation(); // gradio must not take it for another control's
            onSlider(event.target);
        } else if (event.target.matches && event.target.matches(LIST)) {
            onList(event.target.value);
        }
    }

    // Newest gradio leaves elements alone whose HTML is the same again, with what was done to them since.
    function onChange() {
        const shown = document.querySelector(".prefuse-sliders");
        if (!shown || shown.dataset.prefuseSerial === serial) return;
        serial = shown.dataset.prefuseSerial;
        for (const input of shown.querySelectorAll("input")) input.value = input.getAttribute("value");
    }

    // Into the prompt of the page or of txt2img; another tag of the same LoRA makes way.
    function put(place = "#prefuse-blocks-tag") {
        const prompt = document.querySelector(PROMPTS);
        const shown = document.querySelector(`${place} code`);
        if (!prompt || !shown) return;
        const tag = shown.textContent;
        const begin = tag.slice(0, tag.indexOf(":", "<lora:".length) + 1);
        const from = prompt.value.indexOf(begin);
        const to = prompt.value.indexOf(">", from);
        if (from >= 0 && to >= 0) write(prompt, prompt.value.slice(0, from) + tag + prompt.value.slice(to + 1));
        else write(prompt, `${prompt.value.trimEnd()} ${tag}`.trimStart());
    }

    if (window.prefuseBlocks) return; // the page was loaded anew
    window.prefuseBlocks = {put};
    document.addEventListener("input", onInput, true);
    const changes = {subtree: true, childList: true, attributeFilter: ["data-prefuse-serial"]};
    new MutationObserver(onChange).observe(document.documentElement, changes);
})();
