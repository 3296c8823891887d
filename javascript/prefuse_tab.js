// The page "Prefuse": tooltips, keys, copying. Loaded by the WebUI as a file, and by the page itself elsewhere.

(function() {
    function root() {
        return document.getElementById("prefuse");
    }

    function showHints() {
        const data = document.getElementById("prefuse-hints");
        if (!data || data.dataset.done) return;
        const hints = JSON.parse(data.dataset.hints);
        const missing = Object.keys(hints).filter((id) => !document.getElementById(id));
        for (const [id, hint] of Object.entries(hints)) {
            const element = document.getElementById(id);
            if (element) element.title = hint;
        }
        if (!missing.length) data.dataset.done = "1";
    }

    function onKey(event) {
        if (!(event.key === "Enter" && (event.ctrlKey || event.metaKey))) return;
        const tab = root() && root().contains(event.target) && event.target.closest("[role=tabpanel], .tabitem");
        const button = tab && tab.querySelector(".prefuse-start");
        if (!button) return;
        event.preventDefault();
        (button.tagName === "BUTTON" ? button : button.querySelector("button") || button).click();
    }

    if (window.prefuseTab) return; // the page was loaded anew
    window.prefuseTab = true;
    document.addEventListener("keydown", onKey, true);
    setInterval(showHints, 500);
})();
