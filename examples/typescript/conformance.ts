// Holds a running server to its contract, as a TypeScript client sees it. The first wrong answer ends it with an error.
//
//   OPSMANTIK_TOKEN=om_… npx tsx conformance.ts SITE [PART …]
//
// The token needs all scopes and exactly this site, whose region is US and on whose number nobody else has clicked.
// Without a PART all of them are run.

import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import { once } from "node:events";
import { type Client, type ClientReadableStream, Metadata, type ServiceError, status } from "@grpc/grpc-js";
import { address, ask, bearer, security, within } from "./connect.js";
import { BadRequest, Status } from "./gen/google/rpc/status.js";
import { type HealthCheckResponse, HealthCheckResponse_ServingStatus, HealthClient } from "./gen/grpc/health/v1/health.js";
import {
  ServerReflectionClient,
  ServerReflectionRequest,
  type ServerReflectionResponse,
} from "./gen/grpc/reflection/v1/reflection.js";
import { CallStatus, MatchMethod, PushedCall, ReviewStatus } from "./gen/opsmantik/v1/call.js";
import {
  type CallChange,
  CallsServiceClient,
  GetCallRequest,
  ListCallsRequest,
  RecordCallRequest,
  RecordCallsRequest,
  RecordEffect,
  ReviewCallRequest,
  type WatchCallsResponse,
} from "./gen/opsmantik/v1/calls.js";
import { Event } from "./gen/opsmantik/v1/event.js";
import {
  type EventChange,
  IngestRequest,
  type IngestResult,
  IngestServiceClient,
  type StreamIngestResponse,
  type WatchEventsResponse,
} from "./gen/opsmantik/v1/ingest.js";
import { RejectionReason } from "./gen/opsmantik/v1/rejection.js";
import {
  GetSessionScoreRequest,
  ListTopSessionsRequest,
  ScoreSignalsRequest,
  ScoringServiceClient,
  type SessionChange,
  type WatchSessionsResponse,
} from "./gen/opsmantik/v1/scoring.js";
import { Attribution, ClickIdOrigin, type Session, type SessionKey } from "./gen/opsmantik/v1/session.js";
import { Signal } from "./gen/opsmantik/v1/signal.js";
import { ChangeKind } from "./gen/opsmantik/v1/watch.js";

const site = process.argv[2] ?? "";
const [number, caller] = ["+12025550123", "+12025550187"];
const services = ["IngestService", "ScoringService", "CallsService"].map((name) => `opsmantik.v1.${name}`);

const ingest = new IngestServiceClient(address, security, bearer());
const scoring = new ScoringServiceClient(address, security, bearer());
const calls = new CallsServiceClient(address, security, bearer());
const health = new HealthClient(address, security);

/** The error of a call that must fail with this code. */
async function refused(code: status, call: Promise<unknown>): Promise<ServiceError> {
  const error = await call.then(() => assert.fail(`expected ${status[code]}, found an answer`), (error: ServiceError) => error);
  assert.equal(status[error.code], status[code], error.message);
  return error;
}

/** What a `google.rpc.BadRequest` in the details of an INVALID_ARGUMENT complains of. */
function violations(error: ServiceError): string[][] {
  const [details] = error.metadata.get("grpc-status-details-bin");
  assert.ok(details instanceof Buffer, "no details");
  const found = Status.decode(details).details.find((detail) => detail.typeUrl.endsWith("/google.rpc.BadRequest"));
  assert.ok(found, "no google.rpc.BadRequest");
  return BadRequest.decode(found.value).fieldViolations.map(({ field, reason }) => [field, reason]);
}

const event = (sessionId: string, more: Partial<Event> = {}): Event =>
  Event.fromPartial({ id: randomUUID(), site, url: "https://shop.example/", sessionId, category: "system", ...more });

async function store(...events: Event[]): Promise<IngestResult[]> {
  const { results } = await ask(ingest, ingest.ingest, IngestRequest.fromPartial({ events }));
  assert.deepEqual(results.map((result) => result.eventId), events.map((event) => event.id));
  return results;
}

function placement(result: IngestResult | undefined) {
  assert.equal(result?.outcome?.$case, "stored");
  return result.outcome.value;
}

function sessionOf(result: IngestResult | undefined): SessionKey {
  const { session } = placement(result);
  assert.ok(session);
  return session;
}

const scoreOf = (session: SessionKey, client = scoring) =>
  ask(client, client.getSessionScore, GetSessionScoreRequest.fromPartial({ session }));

type Told = WatchEventsResponse | WatchSessionsResponse | WatchCallsResponse;

/** A watch, message by message. */
class Watch {
  readonly messages: AsyncIterator<Told>;

  constructor(readonly stream: ClientReadableStream<Told>) {
    this.messages = (stream as AsyncIterable<Told>)[Symbol.asyncIterator]();
  }

  /** What is told until a message is wanted, which is the last of them; heartbeats aside. */
  async until(wanted: (message: Told) => boolean): Promise<Told[]> {
    const told: Told[] = [];
    for (;;) {
      const { value, done } = await this.messages.next();
      assert.ok(!done, "a watch has no end");
      assert.ok(value.resumeToken.length >= 1 && value.resumeToken.length <= 256);
      if (value.payload?.$case === "heartbeat") continue;
      told.push(value);
      if (wanted(value)) return told;
    }
  }

  /** The rows that are there. */
  async snapshot() {
    const told = await this.until((message) => message.payload?.$case === "snapshotEnd");
    assert.equal(told.shift()?.payload?.$case, "snapshotStart");
    told.pop();
    return told.map(changeOf).map((change) => {
      assert.equal(change.kind, ChangeKind.CHANGE_KIND_SNAPSHOT);
      assert.deepEqual([change.old, change.committedAt], [undefined, undefined]);
      return change.new;
    });
  }

  /** The first change of a row that comes, with its token. */
  async change(key: string) {
    const about = ({ payload }: Told) => payload?.$case === "change" && JSON.stringify(payload.value.new).includes(key);
    const last = (await this.until(about)).at(-1);
    assert.ok(last);
    return { change: changeOf(last), token: last.resumeToken };
  }

  /** The error of a watch that tells nothing. */
  refused = (code: status) => refused(code, this.messages.next());
}

function changeOf({ payload }: Told): EventChange | SessionChange | CallChange {
  assert.ok(payload?.$case === "change");
  return payload.value;
}

/** Reads a stream to its end; the error of one that does not end well. */
async function drained(stream: ClientReadableStream<HealthCheckResponse>): Promise<ServiceError | undefined> {
  try {
    for await (const _ of stream);
  } catch (error) {
    return error as ServiceError;
  }
  return undefined;
}

const parts: Record<string, () => Promise<void>> = {
  async ingest() {
    const session = randomUUID();
    const first = event(session, { category: "interaction", action: "view" });
    const url = "https://shop.example/?gclid=typescript";
    const second = event(session, { category: "conversion", action: "form_submit", url });
    const results = await store(first, second, event(session, { url: "" }));
    assert.deepEqual(results.map((result) => result.outcome?.$case), ["stored", "stored", "rejected"]);
    const rejected = results[2]?.outcome;
    assert.ok(rejected?.$case === "rejected");
    assert.equal(rejected.value.field, "url");
    assert.equal(rejected.value.reason, RejectionReason.REJECTION_REASON_MISSING);
    const placed = placement(results[1]);
    assert.deepEqual([placed.session?.sessionId, placed.sessionScore?.value], [session, 60]);
    assert.equal(placed.attribution, Attribution.ATTRIBUTION_DIRECT_TO_ADS);
    assert.equal((await store(first))[0]?.outcome?.$case, "duplicate");
  },

  async stream() {
    const session = randomUUID();
    const events = Array.from({ length: 200 }, (_, n) => event(session, { action: `step-${n}` }));
    const stream = ingest.streamIngest(new Metadata(), within(30));
    const told = new Map<string, IngestResult | undefined>();
    stream.on("data", ({ messageId, result }: StreamIngestResponse) => told.set(messageId, result));
    const ended = once(stream, "end");
    for (const [n, event] of events.entries()) {
      // Flow control: wait when the server cannot keep up.
      if (!stream.write({ messageId: `m${n}`, event })) await once(stream, "drain");
    }
    stream.write({ messageId: "bad", event: event(session, { url: "" }) });
    stream.end();
    await ended;
    assert.equal(told.size, 201);
    events.forEach((event, n) => assert.equal(told.get(`m${n}`)?.eventId, event.id));
    events.forEach((_, n) => assert.equal(told.get(`m${n}`)?.outcome?.$case, "stored"));
    assert.equal(told.get("bad")?.outcome?.$case, "rejected");
  },

  async scoring() {
    const request = { signals: [Signal.SIGNAL_HOVER_INTENT], facts: [{ scrollPct: 90 }] };
    const { score } = await ask(scoring, scoring.scoreSignals, ScoreSignalsRequest.fromPartial(request));
    assert.deepEqual([score?.value, score?.breakdown.map((line) => line.points)], [45, [10, 20, 15]]);

    const visits = [randomUUID(), randomUUID(), randomUUID()];
    const url = "https://shop.example/?wbraid=typescript";
    const clicks = visits.map((visit) => event(visit, { category: "interaction", url }));
    const key = sessionOf((await store(...clicks))[0]);
    const answer = await scoreOf(key);
    assert.deepEqual(answer.session, key);
    assert.equal(answer.evidence.length, 1);
    const [line] = answer.evidence;
    assert.ok(line?.cause?.$case === "event");
    assert.deepEqual([line.signal, line.cause.value.eventId], [Signal.SIGNAL_INTERACTION, clicks[0]?.id]);
    const evidence = answer.attributionEvidence;
    assert.deepEqual([evidence?.clickId?.value, evidence?.eventId], ["typescript", clicks[0]?.id]);
    assert.deepEqual([evidence?.age?.seconds, evidence?.origin], [0, ClickIdOrigin.CLICK_ID_ORIGIN_THIS_SESSION]);

    const list = ListTopSessionsRequest.fromPartial({ site, sessionMonth: key.sessionMonth, minScore: 10, pageSize: 1 });
    const listed: Session[] = [];
    do {
      const page = await ask(scoring, scoring.listTopSessions, list);
      assert.ok(page.sessions.length <= 1);
      listed.push(...page.sessions);
      list.pageToken = page.nextPageToken;
    } while (list.pageToken);
    const ids = listed.map((session) => session.key?.sessionId);
    const sorted = [...listed].sort(
      (a, b) =>
        (b.score?.value ?? 0) - (a.score?.value ?? 0) || (a.key?.sessionId ?? "").localeCompare(b.key?.sessionId ?? ""),
    );
    assert.deepEqual(listed, sorted);
    assert.equal(new Set(ids).size, ids.length);
    assert.ok(visits.every((visit) => ids.includes(visit)));
  },

  async calls() {
    const click = event(randomUUID(), { category: "conversion", action: "phone_call", label: `tel:${number}` });
    const session = sessionOf((await store(click))[0]);
    const pushed = PushedCall.fromPartial({
      site,
      key: { provider: "Example", providerCallId: randomUUID() },
      dialledNumber: "(202) 555-0123", // read in the site's region
      callerNumber: caller,
      startedAt: new Date(),
      status: CallStatus.CALL_STATUS_RINGING,
    });
    const push = async () => {
      const { recorded } = await ask(calls, calls.recordCall, RecordCallRequest.fromPartial({ call: pushed }));
      assert.ok(recorded?.call);
      return { effect: recorded.effect, call: recorded.call };
    };
    const { effect, call } = await push();
    assert.equal(effect, RecordEffect.RECORD_EFFECT_CREATED);
    assert.deepEqual([call.key?.provider, call.dialledNumber, call.status], ["example", number, pushed.status]);
    assert.deepEqual([call.caller?.lastDigits, call.caller?.anonymous], ["87", false]);
    assert.ok(!JSON.stringify(call).includes(caller.slice(2)), "the number is never given out");
    assert.deepEqual([call.match?.method, call.match?.session], [MatchMethod.MATCH_METHOD_CLICK, session]);
    assert.deepEqual([call.match?.evidence?.eventId, call.match?.evidence?.clickedNumber], [click.id, number]);
    assert.equal((await push()).effect, RecordEffect.RECORD_EFFECT_UNCHANGED);
    pushed.status = CallStatus.CALL_STATUS_COMPLETED;
    pushed.duration = { $case: "durationText", value: "3:12" };
    const merged = await push();
    assert.deepEqual([merged.effect, merged.call.id], [RecordEffect.RECORD_EFFECT_MERGED, call.id]);
    assert.equal(merged.call.durationSeconds, 192);

    const other = { ...pushed, key: { provider: "example", providerCallId: randomUUID() } };
    const batch = RecordCallsRequest.fromPartial({ calls: [other, { ...other, dialledNumber: "no number" }, pushed] });
    const { results } = await ask(calls, calls.recordCalls, batch);
    assert.deepEqual(results.map((result) => result.outcome?.$case), ["recorded", "rejected", "recorded"]);
    const [, rejected, again] = results.map((result) => result.outcome);
    assert.ok(rejected?.$case === "rejected" && again?.$case === "recorded");
    assert.deepEqual([rejected.value.field, again.value.call?.id], ["dialled_number", call.id]);

    const get = (which: GetCallRequest["call"]) => ask(calls, calls.getCall, GetCallRequest.fromPartial({ site, call: which }));
    const byId = await get({ $case: "callId", value: call.id });
    assert.ok(pushed.key);
    assert.deepEqual(await get({ $case: "key", value: pushed.key }), byId);
    await refused(status.NOT_FOUND, get({ $case: "callId", value: randomUUID() }));
    const list = ListCallsRequest.fromPartial({ site, matchMethods: [MatchMethod.MATCH_METHOD_CLICK], pageSize: 1 });
    const listed: string[] = [];
    do {
      const page = await ask(calls, calls.listCalls, list);
      listed.push(...page.calls.map((found) => found.id));
      list.pageToken = page.nextPageToken;
    } while (list.pageToken);
    assert.ok(listed.includes(call.id));
    assert.equal(new Set(listed).size, listed.length);

    const causes = (await scoreOf(session)).evidence.map((line) => line.cause?.$case);
    assert.deepEqual(causes, ["event", "call"]);

    const review = async (decision: ReviewCallRequest["decision"]) => {
      const request = ReviewCallRequest.fromPartial({ site, callId: call.id, decision });
      return (await ask(calls, calls.reviewCall, request)).call?.review;
    };
    const saleAmount = { currencyCode: "USD", units: 120, nanos: 500_000_000 };
    const confirmed = await review({ $case: "confirm", value: { saleAmount } });
    assert.equal(confirmed?.status, ReviewStatus.REVIEW_STATUS_CONFIRMED);
    assert.deepEqual(confirmed.saleAmount, saleAmount);
    assert.match(confirmed.reviewedBy, /^token:/);
    const junk = await review({ $case: "junk", value: {} });
    assert.deepEqual([junk?.status, junk?.saleAmount], [ReviewStatus.REVIEW_STATUS_JUNK, undefined]);
    assert.equal((await review({ $case: "reopen", value: {} }))?.status, ReviewStatus.REVIEW_STATUS_OPEN);
    const owed = review({ $case: "confirm", value: { saleAmount: { ...saleAmount, units: -1, nanos: 0 } } });
    await refused(status.INVALID_ARGUMENT, owed);
  },

  async watch() {
    const visit = randomUUID();
    const [first, second, third] = [0, 1, 2].map((n) => event(visit, { action: `step-${n}` }));
    assert.ok(first && second && third);
    const session = sessionOf((await store(first))[0]);
    const month = { site, sessionMonth: session.sessionMonth };
    const open = {
      events: (resumeToken?: string) => new Watch(ingest.watchEvents({ ...month, resumeToken }, new Metadata(), within(30))),
      sessions: (resumeToken?: string) => new Watch(scoring.watchSessions({ site, resumeToken }, new Metadata(), within(30))),
      calls: (site: string) => new Watch(calls.watchCalls({ site }, new Metadata(), within(30))),
    };
    const [events, sessions, rung] = [open.events(), open.sessions(), open.calls(site)];
    assert.ok((await events.snapshot()).some((row) => row && "url" in row && row.id === first.id));
    assert.ok((await sessions.snapshot()).some((row) => row && "eventCount" in row && row.key?.sessionId === visit));
    await rung.snapshot();

    await store(second);
    const { change, token } = await events.change(second.id ?? "");
    assert.deepEqual([change.kind, change.old], [ChangeKind.CHANGE_KIND_INSERT, undefined]);
    assert.ok(change.committedAt && change.new && "action" in change.new && change.new.action === "step-1");
    const merged = (await sessions.change(visit)).change;
    assert.equal(merged.kind, ChangeKind.CHANGE_KIND_UPDATE);
    assert.ok(merged.old && "eventCount" in merged.old && merged.new && "eventCount" in merged.new);
    assert.deepEqual([merged.old.key, merged.old.eventCount, merged.new.eventCount], [session, 1, 2]);
    const pushed = PushedCall.fromPartial({
      site,
      key: { provider: "watch", providerCallId: randomUUID() },
      dialledNumber: "+12025550199",
      startedAt: new Date(),
    });
    const { recorded } = await ask(calls, calls.recordCall, RecordCallRequest.fromPartial({ call: pushed }));
    const arrived = (await rung.change(recorded?.call?.id ?? "none")).change;
    assert.deepEqual([arrived.kind, arrived.new], [ChangeKind.CHANGE_KIND_INSERT, recorded?.call]);

    // Whoever comes back is told what happened meanwhile, and nothing of before.
    events.stream.on("error", () => {}).cancel();
    await store(third);
    const back = open.events(token);
    const told = await back.until((message) => JSON.stringify(message).includes(third.id ?? "none"));
    const rows = told.filter((message) => message.payload?.$case === "change").map((message) => changeOf(message).new);
    assert.deepEqual(rows.map((row) => row && "url" in row && row.id), [third.id]);
    await open.sessions(token).refused(status.INVALID_ARGUMENT);
    await open.events(token.slice(0, -4)).refused(status.INVALID_ARGUMENT);
    const bad = new Watch(ingest.watchEvents({ site, sessionMonth: "2026-11-02" }, new Metadata(), within(10)));
    assert.deepEqual(violations(await bad.refused(status.INVALID_ARGUMENT)), [["session_month", "REJECTION_REASON_INVALID"]]);
    await open.calls(randomUUID()).refused(status.PERMISSION_DENIED);
    for (const watch of [back, sessions, rung]) watch.stream.on("error", () => {}).cancel();
  },

  async errors() {
    const signals = ScoreSignalsRequest.fromPartial({ signals: [Signal.SIGNAL_UNSPECIFIED] });
    let error = await refused(status.INVALID_ARGUMENT, ask(scoring, scoring.scoreSignals, signals));
    assert.deepEqual(violations(error), [["signals[0]", "REJECTION_REASON_INVALID"]]);
    const key = { siteId: site, sessionMonth: "2026-13-01", sessionId: "a-visit" };
    error = await refused(status.INVALID_ARGUMENT, scoreOf(key));
    assert.deepEqual(violations(error), [["session.session_month", "REJECTION_REASON_INVALID"]]);
    error = await refused(status.INVALID_ARGUMENT, ask(ingest, ingest.ingest, { events: [] }));
    assert.deepEqual(violations(error), [["events", "REJECTION_REASON_MISSING"]]);

    key.sessionMonth = "2026-01-01";
    await refused(status.NOT_FOUND, scoreOf(key));
    key.siteId = randomUUID();
    await refused(status.PERMISSION_DENIED, scoreOf(key));
    await refused(status.UNAUTHENTICATED, scoreOf(key, new ScoringServiceClient(address, security)));
    const stranger = new ScoringServiceClient(address, security, bearer(`om_${"0".repeat(43)}`));
    await refused(status.UNAUTHENTICATED, scoreOf(key, stranger));
  },

  async deadline() {
    const error = await drained(health.watch({ service: "" }, new Metadata(), within(0.5)));
    assert.equal(error?.code, status.DEADLINE_EXCEEDED);
  },

  async cancellation() {
    const watch = health.watch({ service: "" }, new Metadata(), within(10));
    await once(watch, "data");
    watch.cancel();
    assert.equal((await drained(watch))?.code, status.CANCELLED);
    await ask(health, health.check, { service: "" });
  },

  async health() {
    const serving = HealthCheckResponse_ServingStatus.SERVING;
    for (const service of ["", ...services]) {
      assert.equal((await ask(health, health.check, { service })).status, serving, service);
      const watch = health.watch({ service }, new Metadata(), within(10));
      const [told] = (await once(watch, "data")) as [HealthCheckResponse];
      assert.equal(told.status, serving, service);
      watch.cancel();
      await drained(watch);
    }
    await refused(status.NOT_FOUND, ask(health, health.check, { service: "nobody" }));
  },

  async reflection() {
    const reflection = new ServerReflectionClient(address, security, bearer());
    const stream = reflection.serverReflectionInfo(new Metadata(), within(10));
    stream.write(ServerReflectionRequest.fromPartial({ messageRequest: { $case: "listServices", value: "" } }));
    stream.end();
    const listed: string[] = [];
    for await (const answer of stream as AsyncIterable<ServerReflectionResponse>) {
      listed.push(...(answer.messageResponse?.value.service ?? []).map((service) => service.name));
    }
    for (const service of [...services, "grpc.health.v1.Health"]) assert.ok(listed.includes(service), service);
    reflection.close();
  },
};

const asked = process.argv.slice(3);
for (const name of asked.length > 0 ? asked : Object.keys(parts)) {
  const part = parts[name];
  assert.ok(part, `no part ${name}`);
  await part();
  console.log(`ok ${name}`);
}
const clients: Client[] = [ingest, scoring, calls, health];
clients.forEach((client) => client.close());
