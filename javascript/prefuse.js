// Two things in the page: a line under the pictures that says what Prefuse did, and clicks on LoRA cards that find tags
// with named arguments or a minus sign. What comes from a prompt or a file is only ever set as text.

(function() {
    const TABS = ["txt2img", "img2img"];
    const FIELD = "Prefuse";
    const TAG = /<(lora|lyco):([^>]+)>/g;

    function numbers(lora) {
        const strength = lora.te === lora.unet ? `${lora.unet}` : `te ${lora.te}, unet ${lora.unet}`;
        return `${lora.name} ${strength}`;
    }

    function describePass(entry, several) {
        const applied = entry.applied.map(numbers).join(" + ") || "no LoRA";
        const verb = entry.mode === "hook" ? "hooked" : "fused";
        const work = entry.layers ? `${entry.layers} layers ${verb} in ${entry.milliseconds} ms` : "nothing to change";
        const refused = entry.refused.length ? `; not applied: ${entry.refused.map((one) => one.name).join(", ")}` : "";
        return `${several ? `${entry.pass} pass: ` : ""}${applied} (${work})${refused}`;
    }

    function describe(generation) {
        const entries = (generation.extra_generation_params || {})[FIELD] || [];
        return entries.map((entry) => describePass(entry, entries.length > 1)).join(" | ");
    }

    function statusLine(tab) {
        const log = gradioApp().querySelector(`#html_log_${tab}`);
        if (!log || !log.parentElement) return null;
        let line = gradioApp().querySelector(`#prefuse_status_${tab}`);
        if (!line) {
            line = document.createElement("p");
            line.id = `prefuse_status_${tab}`;
            line.className = "prefuse-status";
        }
        // Gradio makes its parts anew at times; the line follows them.
        if (line.previousElementSibling !== log) log.after(line);
        return line;
    }

    function showStatus(tab) {
        const data = gradioApp().querySelector(`#generation_info_${tab} textarea`);
        const line = data && data.value ? statusLine(tab) : null;
        if (!line || line.dataset.shown === data.value) return;
        let generation = {};
        try {
            generation = JSON.parse(data.value);
        } catch (error) {
            generation = {}; // half-written data: the next update has all of it
        }
        line.dataset.shown = data.value;
        const text = describe(generation);
        line.textContent = text ? `Prefuse: ${text}` : "";
        line.classList.toggle("prefuse-refused", text.includes("; not applied: "));
    }

    function nameOf(inside) {
        return inside.split(":").find((argument) => argument.split("=").length !== 2);
    }

    function isPlain(inside) {
        return /^[^:]+:[\d.]+$/.test(inside);
    }

    // Takes a LoRA's tags out of a prompt; null if the built-in way finds them all.
    function withoutLora(prompt, text) {
        const card = /^<(lora|lyco):([^>]+)>(.*)$/s.exec(text);
        if (!card) return null;
        const name = nameOf(card[2]);
        const after = card[3];
        const found = [...prompt.matchAll(TAG)].filter((tag) => nameOf(tag[2]) === name);
        if (!found.length || found.every((tag) => tag[1] === card[1] && isPlain(tag[2]))) return null;
        const separator = opts.extra_networks_add_text_separator;
        let rest = prompt;
        for (const tag of found.reverse()) {
            let start = tag.index;
            let end = start + tag[0].length;
            if (after && rest.startsWith(after, end)) end += after.length;
            if (separator && rest.slice(0, start).endsWith(separator)) start -= separator.length;
            rest = rest.slice(0, start) + rest.slice(end);
        }
        return rest;
    }

    function widenCardClicks() {
        const builtIn = window.tryToRemoveExtraNetworkFromPrompt;
        if (typeof builtIn !== "function" || builtIn.isPrefuse) return;
        const widened = function(textarea, text, isNegative) {
            const rest = isNegative ? null : withoutLora(textarea.value, text);
            if (rest === null) return builtIn(textarea, text, isNegative);
            textarea.value = rest;
            return true;
        };
        widened.isPrefuse = true;
        window.tryToRemoveExtraNetworkFromPrompt = widened;
    }

    onUiLoaded(widenCardClicks);
    onAfterUiUpdate(() => TABS.forEach(showStatus));
})();
