(function () {
  "use strict";
  var root = document.documentElement;
  // Theme, scroll position and open folds survive the refresh of a running job.
  function kept(key, value) {
    try {
      if (value === undefined) return sessionStorage.getItem(location.pathname + key);
      sessionStorage.setItem(location.pathname + key, value);
    } catch (error) { /* storage may be off */ }
    return null;
  }
  var theme = kept("theme");
  if (theme) root.dataset.theme = theme;
  var folds = [].slice.call(document.querySelectorAll("details"));
  var open = kept("folds");
  if (open) open.split("").forEach(function (state, n) { if (folds[n]) folds[n].open = state === "1"; });
  if (kept("scroll") && document.querySelector("meta[http-equiv=refresh]")) scrollTo(0, +kept("scroll"));
  addEventListener("pagehide", function () {
    kept("scroll", scrollY);
    kept("folds", folds.map(function (fold) { return fold.open ? "1" : "0"; }).join(""));
  });
  addEventListener("beforeprint", function () { folds.forEach(function (fold) { fold.open = true; }); });

  function valueOf(row, column) {
    var cell = row.children[column];
    if (cell.className === "e") return null;
    var data = cell.querySelector("data");
    if (data) return +data.value;
    var text = cell.textContent.trim(), number = parseFloat(text.replace(/,/g, "").replace("\u2212", "-"));
    return isNaN(number) ? text : number;
  }
  function compare(a, b) {
    if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a < b ? -1 : a > b ? 1 : 0;
  }
  function sort(heading) {
    var table = heading.closest("table"), body = table.tBodies[0];
    showAll(table.getAttribute("aria-labelledby"));
    var column = [].indexOf.call(heading.parentNode.children, heading);
    var down = heading.getAttribute("aria-sort") !== "descending";
    [].forEach.call(heading.parentNode.children, function (other) { other.removeAttribute("aria-sort"); });
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    [].slice.call(body.rows).map(function (row) { return [valueOf(row, column), row]; })
      .sort(function (a, b) {
        if (a[0] === null || b[0] === null) return compare(a[0], b[0]);
        return down ? compare(b[0], a[0]) : compare(a[0], b[0]);
      })
      .forEach(function (pair) { body.appendChild(pair[1]); });
  }
  function showAll(id) {
    var more = document.querySelector('[data-more="' + id + '"]');
    if (!more) return;
    var table = document.querySelector('table[aria-labelledby="' + id + '"]');
    [].forEach.call(table.tBodies[0].rows, function (row) { row.hidden = false; });
    more.parentNode.remove();
  }
  document.addEventListener("click", function (event) {
    var link = event.target.closest("a[href^='#']"), fold = link && document.querySelector("details" + link.hash);
    if (fold) fold.open = true;
    var button = event.target.closest("button");
    if (!button) return;
    if (button.id === "theme") {
      var dark = root.dataset.theme || (matchMedia("(prefers-color-scheme:dark)").matches ? "dark" : "light");
      root.dataset.theme = dark === "dark" ? "light" : "dark";
      kept("theme", root.dataset.theme);
    }
    if (button.dataset.copy) {
      var text = document.getElementById(button.dataset.copy);
      if (navigator.clipboard) {
        navigator.clipboard.writeText(text.textContent).then(function () { button.textContent = "Copied"; }, function () {});
      } else {
        getSelection().selectAllChildren(text);
      }
    }
    if (button.dataset.more) showAll(button.dataset.more);
    var heading = button.closest("th");
    if (heading && heading.closest("table.sortable")) sort(heading);
  });

  var verdict = document.querySelector("[data-updated]");
  if (verdict) {
    var seconds = (Date.now() - Date.parse(verdict.dataset.updated)) / 1000;
    if (seconds > +verdict.dataset.patience) {
      var words = seconds < 7200 ? Math.round(seconds / 60) + " min" : Math.round(seconds / 3600) + " h";
      var line = document.getElementById("stopped");
      line.textContent = "Stopped? Last update " + words + " ago.";
      line.hidden = false;
    }
  }
})();
