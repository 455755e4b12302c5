// The judge of publishing: QStash's own Client. Reads {package, baseUrl, token, one, many} from standard input, publishes `one` by publishJSON
// and `many` by batchJSON, and writes QStash's answers.
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const { package: path, baseUrl, token, one, many } = JSON.parse(await text(process.stdin));
const { Client } = createRequire(import.meta.url)(path);
const client = new Client({ baseUrl, token, retry: false });
const published = await client.publishJSON(one);
const batch = await client.batchJSON(many);
process.stdout.write(JSON.stringify({ published, batch }));
