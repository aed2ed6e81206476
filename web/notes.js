// The notes of the templates in the person's language. ComfyUI translates nodes, not what stands in a
// graph: a note that still says what its template says is exchanged when the graph is opened.
import { app } from "../../scripts/app.js";

const known = {};

/** The notes of a language by template, or null where there are none. */
function notes(language) {
  known[language] ??= fetch(new URL(`./notes/${language}.json`, import.meta.url))
    .then((answer) => (answer.ok ? answer.json() : null))
    .catch(() => null);
  return known[language];
}

app.registerExtension({
  name: "GenDR.TemplateNotes",
  async beforeConfigureGraph(graph) {
    const found = (graph?.nodes ?? []).filter((node) => node.type === "MarkdownNote");
    const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
    if (!found.length || language === "en") return;
    const [before, after] = await Promise.all([notes("en"), notes(language)]);
    if (!before || !after) return;
    for (const node of found) {
      const text = node.widgets_values?.[0];
      const template = Object.keys(before).find((name) => before[name] === text);
      if (!template || !after[template]) continue;
      node.widgets_values[0] = after[template];
      if (node.title === before.title) node.title = after.title;
    }
  },
});
