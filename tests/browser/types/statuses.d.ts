// The module that the viewer's server makes of the client's table.

export interface Entry {
  final: boolean;
  mark: string;
}

export const STATUSES: Map<string, Entry>;
export const UNKNOWN: Entry;
