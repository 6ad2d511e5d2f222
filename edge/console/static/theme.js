// Before the first paint: the theme that was chosen here. "auto" follows the machine.
(function () {
  "use strict";
  let chosen = "auto";
  try {
    chosen = localStorage.getItem("kizu-theme") || "auto";
  } catch (refused) {
    // A browser without storage follows the machine.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  if (location.search === "?wrong") document.documentElement.dataset.wrong = "";
})();
