// Two things in the page: a line under the pictures that says what Prefuse did, and clicks on LoRA cards that find tags
// with named arguments or a minus sign. What comes from a prompt or a file is only ever set as text.

(function() {
    const TABS = ["txt2img", "img2img"];
    const FIELD = "Prefuse";
    const TAG = /<(lora|lyco):([^>]+)>/g;

    const shown = {}; // tab -> its line and the data that it tells

    function numbers(lora) {
        const strength = lora.te === lora.unet ? `${lora.unet}` : `te ${lora.te}, unet ${lora.unet}`;
        return `${lora.name} ${strength}${lora.schedule ? ` [${lora.schedule}]` : ""}`;
    }

    function duration(milliseconds) {
        return `${milliseconds < 10 ? milliseconds : Math.round(milliseconds)} ms`;
    }

    function workOf(entry) {
        const fused = entry.mode === "hook" ? "hooked" : "fused";
        const time = duration(entry.milliseconds);
        if (!entry.layers) return entry.applied.length ? ` (already ${fused}, ${time})` : "";
        return ` (${entry.layers} layers ${entry.applied.length ? fused : "restored"} in ${time})`;
    }

    function describePass(entry, several) {
        const applied = entry.applied.map(numbers).join(" + ") || "no LoRA";
        return `${several ? `${entry.pass} pass: ` : ""}${applied}${workOf(entry)}`;
    }

    function refusals(entries) {
        return [...new Set(entries.flatMap((entry) => entry.refused.map((one) => one.name)))].join(", ");
    }

    // What the mouse over the line says: block weights, how a strength moved, why something was refused, and remarks.
    function details(entries) {
        const more = (lora) => [lora.weights, lora.moving].filter(Boolean).map((text) => `${lora.name}: ${text}`);
        const reasons = (entry) => entry.refused.map((one) => one.reason);
        const lines = entries.flatMap((entry) => [...entry.applied.flatMap(more), ...reasons(entry), ...entry.notes]);
        return [...new Set(lines)].join("\n");
    }

    function statusLine(tab) {
        const log = gradioApp().querySelector(`#html_log_${tab}`);
        if (!log || !log.parentElement) return null;
        if (!shown[tab]) {
            const line = document.createElement("p");
            line.id = `prefuse_status_${tab}`;
            line.className = "prefuse-status";
            shown[tab] = {line, data: null};
        }
        // Gradio makes its parts anew at times; the line follows them.
        if (shown[tab].line.previousElementSibling !== log) log.after(shown[tab].line);
        return shown[tab];
    }

    function textPart(text, className) {
        const part = document.createElement("span");
        part.className = className;
        part.textContent = text;
        return part;
    }

    function showStatus(tab) {
        const data = gradioApp().querySelector(`#generation_info_${tab} textarea`);
        const status = data && data.value ? statusLine(tab) : null;
        if (!status || status.data === data.value) return;
        let generation = {};
        try {
            generation = JSON.parse(data.value);
        } catch (error) {
            generation = {}; // half-written data: the next update has all of it
        }
        status.data = data.value;
        const entries = (generation.extra_generation_params || {})[FIELD] || [];
        const passes = entries.map((entry) => describePass(entry, entries.length > 1)).join(" | ");
        const refused = refusals(entries);
        status.line.replaceChildren();
        if (passes) status.line.append(textPart(`Prefuse: ${passes}`, "prefuse-applied"));
        if (refused) status.line.append("; ", textPart(`not applied: ${refused}`, "prefuse-refused"));
        status.line.title = details(entries);
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
