// @ts-check
// Commands and code that follow an execution elsewhere. The key is never in them.

import { clone, copyWith, part, write } from "../library/dom.js";

const VENDOR = "https://api.promptlayer.com";

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function snippetsOf(id, server) {
  const query = `workflow_version_execution_id=${id}&return_all_outputs=true`;
  const isVendor = server === VENDOR;
  const base = isVendor ? "" : `base_url=${JSON.stringify(server)}`;
  return {
    curl: [
      'curl -sS -H "X-API-KEY: $PROMPTLAYER_API_KEY" \\',
      `  ${shell(`${server}/workflow-version-execution-results?${query}`)}`,
    ].join("\n"),
    Python: [
      "import asyncio",
      "from contextlib import aclosing",
      "",
      "from promptlayer_exec import Session",
      "",
      "",
      "async def main() -> None:",
      `    async with Session(${base}) as session:`,
      `        execution = session.execution(${id})`,
      "        async with aclosing(execution.finished_nodes()) as nodes:",
      "            async for node in nodes:",
      "                print(node.name, node.status)",
      "        print(await execution.output())",
      "",
      "",
      "asyncio.run(main())",
    ].join("\n"),
    "Command line": `promptlayer-exec watch ${id}${isVendor ? "" : ` --base-url ${shell(server)}`}`,
  };
}

export function showSnippets(container, id, server) {
  const sections = Object.entries(snippetsOf(id, server)).map(([name, code]) => {
    const root = clone("snippet-template").firstElementChild;
    write(part(root, "name"), name);
    write(part(root, "code"), code);
    part(root, "code").setAttribute("aria-label", `${name} snippet`);
    part(root, "copy").setAttribute("aria-label", `Copy the ${name} snippet`);
    copyWith(part(root, "copy"), part(root, "copied"), () => code, () => part(root, "code"));
    return root;
  });
  container.replaceChildren(...sections);
}
