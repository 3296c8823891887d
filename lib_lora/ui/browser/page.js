// The page "Prefuse": tooltips, keys, copying.

(function() {
    const COPIED_MS = 1500;
    const BAKE_TRIES = 50;
    const LOOK_MS = 2000;
    let hints = null;
    let wasShown = false;

    function readHints() {
        const data = document.getElementById("prefuse-hints");
        return data ? JSON.parse(data.dataset.hints) : null;
    }

    // Gradio makes and unmakes controls at any time, so each gets its tooltip when the mouse or the keyboard reaches it.
    function showHint(event) {
        const control = event.target instanceof Element ? event.target.closest("[id^=prefuse-]") : null;
        if (!control) return;
        hints = hints || readHints();
        if (hints && hints[control.id] && control.title !== hints[control.id]) control.title = hints[control.id];
    }

    function onKey(event) {
        if (!(event.key === "Enter" && (event.ctrlKey || event.metaKey))) return;
        const tab = event.target.closest("#prefuse [role=tabpanel], #prefuse .tabitem");
        const button = tab && tab.querySelector(".prefuse-start");
        if (!button) return;
        event.preventDefault();
        (button.tagName === "BUTTON" ? button : button.querySelector("button") || button).click();
    }

    // Browsers offer the clipboard to safe places alone: this computer, and https.
    function copyWithout(text) {
        const box = document.createElement("textarea");
        box.value = text;
        box.style.position = "fixed";
        document.body.append(box);
        box.select();
        document.execCommand("copy");
        box.remove();
    }

    async function copy(text) {
        try {
            await navigator.clipboard.writeText(text);
        } catch (error) {
            copyWithout(text);
        }
    }

    async function onClick(event) {
        const button = event.target instanceof Element ? event.target.closest(".prefuse-copy") : null;
        if (!button) return;
        event.preventDefault();
        await copy(button.dataset.text);
        button.classList.add("prefuse-copied");
        setTimeout(() => button.classList.remove("prefuse-copied"), COPIED_MS);
    }

    function openTab(scope, title) {
        const tabs = [...document.querySelectorAll(`${scope} button`)].filter((one) => !one.closest("[aria-hidden=true]"));
        const tab = tabs.find((one) => one.textContent.trim() === title);
        if (tab) tab.click();
    }

    // Newer gradios make what is on a tab when it is opened.
    async function bake(workshop, merge) {
        openTab("#prefuse-tabs", workshop);
        for (let tries = 0; tries < BAKE_TRIES; tries++) {
            openTab("#prefuse-workshop", merge);
            const button = document.getElementById("prefuse-workshop-merge-bake");
            if (button && button.offsetParent) return button.click();
            await new Promise((done) => setTimeout(done, 100));
        }
    }

    // A tag goes into the prompt, and the user to where pictures are made: here, or in the WebUI.
    function tryTag(place, generate) {
        window.prefuseBlocks.put(place);
        if (window.switch_to_txt2img) window.switch_to_txt2img();
        else openTab("#prefuse-tabs", generate);
    }

    // How the model runs is asked for when the page comes into sight, and again and again while it is compiled.
    function look() {
        const page = document.getElementById("prefuse");
        const button = document.getElementById("prefuse-compiling-look");
        const isShown = Boolean(button && page.offsetParent && !document.hidden);
        if (isShown && (!wasShown || document.querySelector("#prefuse-compiling [data-live]"))) {
            (button.tagName === "BUTTON" ? button : button.querySelector("button") || button).click();
        }
        wasShown = isShown;
    }

    if (window.prefuseTab) return; // the page was loaded anew
    window.prefuseTab = true;
    window.prefuseBake = bake;
    window.prefuseTry = tryTag;
    document.addEventListener("pointerover", showHint, true);
    document.addEventListener("focusin", showHint, true);
    document.addEventListener("keydown", onKey, true);
    document.addEventListener("click", onClick, true);
    setInterval(look, LOOK_MS);
})();
