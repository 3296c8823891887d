// Prompt boxes of the page "Prefuse": what can follow in a LoRA tag is offered below the box. What comes from files is
// only ever set as text. A picture that is dropped on the box is given to the button that reads pictures.

(function() {
    const BOX = ".prefuse-prompt textarea, .prefuse-prompt input[type=text]";
    const TAG = /<(?:lora|lyco):([^<>\n]*)$/;
    const MOST_SHOWN = 40;
    const list = document.createElement("div");
    const known = {data: null, words: null};
    const shown = {box: null, items: [], chosen: -1, start: 0};

    // The server fills this element when a prompt box gets the focus.
    function told() {
        return document.querySelector("#prefuse-words [data-words]")?.dataset.words ?? null;
    }

    function words() {
        const data = told();
        if (data !== known.data) Object.assign(known, {data, words: data && JSON.parse(data)});
        return known.words || {loras: [], arguments: [], lbw: [], lbwe: []};
    }

    // [words and notes that can stand there, what is written of it, what comes after it]; null outside of a tag.
    function question(before) {
        const tag = TAG.exec(before);
        if (!tag) return null;
        const parts = tag[1].split(":");
        const part = parts.pop();
        if (!parts.length) return [words().loras, part, ":1>"];
        const [name, value] = part.split("=", 2);
        if (value === undefined) return [words().arguments, part, ""];
        if (name === "lbw" || name === "w") return [words().lbw, value, ""];
        return name === "lbwe" ? [words().lbwe, value, ""] : null;
    }

    // Those that begin so, then those that hold it; a note, such as another name, counts too.
    function matches(choices, written) {
        const wanted = written.toLowerCase();
        const places = choices.map((pair) => pair[0].toLowerCase().indexOf(wanted));
        const first = choices.filter((pair, at) => places[at] === 0);
        const inside = choices.filter((pair, at) => places[at] > 0);
        const noted = choices.filter((pair, at) => places[at] < 0 && pair[2] && pair[1].toLowerCase().includes(wanted));
        return [...first, ...inside, ...noted];
    }

    function part(kind, text) {
        const element = document.createElement("span");
        element.className = kind;
        element.textContent = text;
        return element;
    }

    function row([word, note], at) {
        const element = document.createElement("div");
        element.id = `prefuse-choice-${at}`;
        element.setAttribute("role", "option");
        element.append(part("prefuse-word", word), part("prefuse-word-note", note));
        return element;
    }

    function close() {
        list.remove();
        if (shown.box) shown.box.removeAttribute("aria-activedescendant");
        shown.box = null;
    }

    function choose(at) {
        shown.chosen = at;
        [...list.children].forEach((one, place) => one.setAttribute("aria-selected", String(place === at)));
        const row = list.children[at];
        if (!row) return;
        row.scrollIntoView({block: "nearest"});
        shown.box.setAttribute("aria-activedescendant", row.id);
    }

    function placeBelow(box) {
        const place = box.getBoundingClientRect();
        const width = Math.min(place.width, 480);
        Object.assign(list.style, {left: `${place.left + scrollX}px`, top: `${place.bottom + scrollY}px`, width: `${width}px`});
    }

    function open(box) {
        const asked = box.selectionStart === box.selectionEnd ? question(box.value.slice(0, box.selectionStart)) : null;
        const items = asked ? matches(asked[0], asked[1]).slice(0, MOST_SHOWN) : [];
        // What is written in full asks for nothing more.
        if (!items.length || (items.length === 1 && items[0][0] === asked[1])) return close();
        Object.assign(shown, {box, items, start: box.selectionStart - asked[1].length, after: asked[2]});
        list.replaceChildren(...items.map(row));
        if (!list.isConnected) document.body.append(list);
        placeBelow(box);
        choose(asked[1] || asked[2] ? 0 : -1);
    }

    // As if it was typed, so that it can be undone and gradio knows.
    function write(box, start, end, text) {
        box.focus();
        box.setSelectionRange(start, end);
        if (document.execCommand("insertText", false, text)) return;
        box.setRangeText(text, start, end, "end");
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }

    function take(at) {
        const {box, start, after} = shown;
        const [word] = shown.items[at];
        const rest = box.value.slice(box.selectionEnd);
        const closed = /^[^<\n]*>/.test(rest);
        const end = after ? box.selectionEnd + (closed ? rest.search(/[:>]/) : 0) : box.selectionEnd;
        const more = closed ? "" : after;
        close();
        write(box, start, end, word + more);
        const cursor = start + word.length + Math.max(more.length - 1, 0);
        box.setSelectionRange(cursor, cursor);
        if (word.endsWith("=")) open(box);
        else close();
    }

    function onKey(event) {
        if (shown.box !== event.target || event.ctrlKey || event.metaKey || event.isComposing) return;
        const count = shown.items.length;
        const move = {ArrowDown: 1, ArrowUp: -1}[event.key];
        if (move) choose((Math.max(shown.chosen, move > 0 ? -1 : 0) + move + count) % count);
        else if (event.key === "Escape") close();
        else if ((event.key === "Tab" || event.key === "Enter") && shown.chosen >= 0) take(shown.chosen);
        else return;
        event.preventDefault();
        event.stopPropagation();
    }

    function isBox(target) {
        return target instanceof Element && target.matches(BOX);
    }

    // A click on the list would take the focus from the box.
    function onListPress(event) {
        event.preventDefault();
        const row = event.target.closest("[role=option]");
        if (row) take([...list.children].indexOf(row));
    }

    function onMoved(event) {
        if (isBox(event.target) && ["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) open(event.target);
    }

    function droppedPicture(event) {
        const files = event.target instanceof Element && event.target.closest(".prefuse-prompt") ? event.dataTransfer?.files : null;
        return files && files.length === 1 && files[0].type === "image/png" ? files : null;
    }

    function onDrop(event) {
        const files = droppedPicture(event);
        const input = files && event.target.closest(".prefuse-reader")?.querySelector("input[type=file]");
        if (!input) return;
        event.preventDefault();
        event.stopPropagation();
        input.files = files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    }

    if (window.prefusePrompt) return; // the page was loaded anew
    window.prefusePrompt = true;
    list.id = "prefuse-completion";
    list.setAttribute("role", "listbox");
    list.addEventListener("mousedown", onListPress);
    document.addEventListener("input", (event) => isBox(event.target) && open(event.target), true);
    document.addEventListener("click", (event) => isBox(event.target) && open(event.target), true);
    document.addEventListener("keydown", onKey, true);
    document.addEventListener("keyup", onMoved, true);
    document.addEventListener("focusout", (event) => event.target === shown.box && close(), true);
    document.addEventListener("drop", onDrop, true);
    // Words that come while the list is open, or should be.
    new MutationObserver(() => {
        const box = document.activeElement;
        if (isBox(box) && told() !== known.data) open(box);
    }).observe(document.documentElement, {childList: true, subtree: true, attributeFilter: ["data-words"]});
})();
