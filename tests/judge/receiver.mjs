// The judge of signatures: QStash's own Receiver. Reads {package, keys, cases: [{signature, url, body}]} from standard input and writes one
// verdict a case, `true` or the error's text.
import { createRequire } from "node:module";
import { text } from "node:stream/consumers";

const { package: path, keys, cases } = JSON.parse(await text(process.stdin));
const { Receiver } = createRequire(import.meta.url)(path);
const receiver = new Receiver({ currentSigningKey: keys.current, nextSigningKey: keys.next });
const verdicts = [];
for (const { signature, url, body } of cases) {
  verdicts.push(
    await receiver.verify({ signature, url, body, clockTolerance: 5 }).catch((error) => `${error.name}: ${error.message}`),
  );
}
process.stdout.write(JSON.stringify(verdicts));
