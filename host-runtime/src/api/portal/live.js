// Live updates: after a change, fetches this page again and replaces its live parts. Without this script a page stays as it was opened.
"use strict";
(() => {
    const status = document.getElementById("status");
    if (!document.querySelector("[data-live]") || !window.EventSource) return;
    let fetching = false, again = false, hush;

    async function refresh() {
        if (fetching) { again = true; return; }
        fetching = true;
        try {
            const answer = await fetch(location.href, { headers: { "X-Live": "1" } });
            // Signed out in the meantime: the next click leads to the sign-in page.
            if (!answer.ok || answer.redirected) return;
            const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
            for (const place of document.querySelectorAll("[data-live]")) {
                const other = fresh.getElementById(place.id);
                if (!other || other.innerHTML === place.innerHTML) continue;
                // Keep the keyboard focus.
                const held = place.contains(document.activeElement) ? document.activeElement.getAttribute("href") || document.activeElement.id : null;
                place.innerHTML = other.innerHTML;
                if (held) [...place.querySelectorAll("a,button,[id]")].find(e => e.getAttribute("href") === held || e.id === held)?.focus();
            }
        } catch { /* retried at the next event */ } finally {
            fetching = false;
            if (again) { again = false; refresh(); }
        }
    }

    const events = new EventSource("/portal/live");
    events.addEventListener("change", event => {
        status.textContent = event.data;
        clearTimeout(hush);
        hush = setTimeout(() => { status.textContent = ""; }, 8000);
        refresh();
    });
    // After a reconnect, fetch the changes that were missed.
    let opened = false;
    events.addEventListener("open", () => { if (opened) refresh(); opened = true; });
})();
