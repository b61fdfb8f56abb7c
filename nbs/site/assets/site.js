// From the file system a page must not fetch others: search shows titles alone there.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

document.addEventListener("DOMContentLoaded", () => {
  // What is wider than the page scrolls within its box, by keyboard too.
  for (const table of document.querySelectorAll(".bd-article table")) {
    if (table.closest(".scroll, .cell_output")) continue;
    const box = document.createElement("div");
    box.className = "scroll";
    table.replaceWith(box);
    box.append(table);
  }
  for (const math of document.querySelectorAll(".bd-article :not(div.math) > math"))
    if (math.getBoundingClientRect().width > math.parentElement.clientWidth) {
      const box = document.createElement("span");
      box.className = "scroll long";
      math.replaceWith(box);
      box.append(math);
    }
  for (const box of document.querySelectorAll(".scroll, .cell_output .output, div.math, a.figure, .highlight pre"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;

  // The gaps: rows that hold every word.
  const field = document.getElementById("filter");
  if (!field) return;
  const rows = [...document.querySelectorAll("table.gaps tr[id]")];
  const filter = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every(w => row.textContent.toLowerCase().includes(w));
    for (const body of document.querySelectorAll("table.gaps tbody"))
      body.hidden = !body.querySelector("tr[id]:not([hidden])");
    document.getElementById("left").value = rows.filter(r => !r.hidden).length;
  };
  field.addEventListener("input", filter);
});
