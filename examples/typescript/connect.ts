// What every program needs: where the server is, a token on every call, and promises instead of callbacks.
//
//   OPSMANTIK_ADDR    where the server listens for gRPC (127.0.0.1:50051)
//   OPSMANTIK_TOKEN   what `opsmantik token issue` printed
//   OPSMANTIK_CA      the certificate authority of the server, a PEM file; without one the channel is plain text

import { readFileSync } from "node:fs";
import {
  type CallOptions,
  type Client,
  type ClientOptions,
  type ClientUnaryCall,
  credentials,
  InterceptingCall,
  type Interceptor,
  Metadata,
  type ServiceError,
} from "@grpc/grpc-js";

const authority = process.env["OPSMANTIK_CA"];

export const address = process.env["OPSMANTIK_ADDR"] ?? "127.0.0.1:50051";
export const security =
  authority === undefined ? credentials.createInsecure() : credentials.createSsl(readFileSync(authority));

/** Options for a client that sends this token with every call. */
export function bearer(token = process.env["OPSMANTIK_TOKEN"] ?? ""): Partial<ClientOptions> {
  const withToken: Interceptor = (options, next) =>
    new InterceptingCall(next(options), {
      start(metadata, listener, proceed) {
        metadata.set("authorization", `Bearer ${token}`);
        proceed(metadata, listener);
      },
    });
  // A connection that is lost without a word is noticed; one that is refused is tried again before long.
  const patience = { "grpc.keepalive_time_ms": 30_000, "grpc.max_reconnect_backoff_ms": 10_000 };
  return { interceptors: [withToken], ...patience };
}

/** The moment until which a call may take. */
export const within = (seconds: number): Partial<CallOptions> => ({ deadline: Date.now() + seconds * 1000 });

/** One question and its answer: `await ask(ingest, ingest.ingest, request)`. */
export function ask<Request, Answer>(
  client: Client,
  rpc: (
    request: Request,
    metadata: Metadata,
    options: Partial<CallOptions>,
    done: (error: ServiceError | null, answer: Answer) => void,
  ) => ClientUnaryCall,
  request: Request,
): Promise<Answer> {
  return new Promise((resolve, reject) => {
    rpc.call(client, request, new Metadata(), within(10), (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}
